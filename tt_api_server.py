#!/usr/bin/env python3
"""tt_api_server: a Llama 3 model behind HTTP, on a Tenstorrent card or on the CPU, in one file.

    python3 tt_api_server.py --port 8080                     # a tiny demo model, made here in seconds
    python3 tt_api_server.py --model ~/models/Llama-3.1-8B-Instruct

    curl -s localhost:8080/chat -H 'Content-Type: application/json' -d '{"prompt": "What is machine learning?"}' | jq

The model is loaded once and stays loaded. Requests that come together are answered together: each holds a slot of one
batch, joins it between two steps, and leaves it when its answer is complete (continuous batching).

    GET  /                      a page to chat in, for browsers
    GET  /health                is it ready, with which model, on what, and how busy
    POST /chat                  {"prompt": ...} or {"messages": [...]}, system, max_tokens, temperature, top_p, top_k,
                                seed, stop, stream
    POST /v1/chat/completions   the same as OpenAI's clients ask for it; /v1/completions and /v1/models too
    GET  /metrics               figures for Prometheus

The rooms of this file, top to bottom; each uses only those above it:

    Libraries      what is imported late, and why
    Checkpoint     from --model, HF_MODEL or LLAMA_DIR to weights that can be read, or to one clear error
    Text           messages to token ids, token ids to text
    Sampling       from logits to the next token
    CPU engine     what an engine is: token ids in, token ids out; and Llama 3 in PyTorch
    Card engine    the same over tt-metal's Generator
    Demo model     a tiny Llama, trained on the spot when no model is given
    Scheduler      the one thread that runs the engine: who is in the batch, what each slot reads next; statistics
    Dialects       from a body's JSON to a request for text, from its answer to JSON
    Page           the chat, for browsers
    HTTP           the socket, the routes, the errors, the metrics
    CLI            options, banner, signals, start and stop

A request goes down through them once, and its answer comes up once:

    socket - ApiHandler - Dialect.read - ChatTokenizer - Scheduler.submit - queue
                                                                              |
    socket - ApiHandler - Dialect - TextStream - Answer - Generation - Scheduler - Engine

The handler's thread owns the socket and the text; the scheduler's one thread owns the engine and the token ids; a
Generation is all that they share.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import sys
import tempfile
import termios
import threading
import time
import urllib.parse
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F

if sys.version_info < (3, 10):  # noqa: UP036
    raise SystemExit(f"error: Python 3.10 or later is needed, and this is {sys.version.split()[0]}: use a newer one")

__version__ = "1.1.0"

logger = logging.getLogger("tt_api_server")


class UserError(Exception):
    """Something that the person at the terminal can put right: one plain sentence, what is wrong and what to do."""


# ======================================================================================================================
# Libraries
# ======================================================================================================================


def import_torch() -> None:
    """Bind the name `torch` in this module: all rooms below use it, and the first second of a start does without.

    PyTorch takes seconds to import. A wrong option, a missing folder or a taken port is reported before that.
    """
    global torch, F
    # OpenMP's threads wait for each other hundreds of times a step. By default they spin, for milliseconds when one of
    # them has lost its core to another program, and a step can take ten times as long. They are to sleep sooner.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # NumPy is not used here
        try:
            import torch
            import torch.nn.functional as F
        except ImportError as error:
            raise UserError(f"PyTorch cannot be imported ({error}): pip install -r requirements.txt") from error


def import_llama_models(name: str) -> Any:
    """Import module `name` of llama-models, which keeps it in llama3.api up to 0.0.61 and in llama3 from 0.1 on."""
    try:
        api = ".api" if importlib.util.find_spec("llama_models.llama3.api") else ""
        return importlib.import_module(f"llama_models.llama3{api}.{name}")
    except ImportError as error:
        raise UserError(f"llama-models cannot be imported ({error}): pip install -r requirements.txt") from error


# ======================================================================================================================
# Checkpoint
# ======================================================================================================================

VOCAB_SIZE = 128256  # of every Llama 3 text model


class RopeScaling(NamedTuple):
    """Llama 3.1's stretching of the rotary wavelengths, as in config.json's rope_scaling."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama 3, under the names of Meta's params.json where it has one."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int
    tied: bool  # output.weight may be missing: it is the embedding

    def __post_init__(self) -> None:
        """Raises ValueError where a number is none, or not above 0: else the first step would fail, or every one."""
        for name, value in {**vars(self), **(self.rope_scaling._asdict() if self.rope_scaling else {})}.items():
            if name not in ("rope_scaling", "tied") and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{name} is {value!r}")

    @staticmethod
    def from_meta(params: dict[str, Any], hf_config: dict[str, Any] | None) -> LlamaConfig:
        """Read Meta's params.json; what it does not say comes from the config.json beside it, if there is one."""
        if "vision_chunk_size" in params or "vision_args" in params:
            raise UserError("this is a vision model, and only text models are served: name a Llama 3 text model")
        check_vocabulary(params)
        if "quantization_args" in params or "lora_args" in params:
            raise UserError("this is a quantized or LoRA checkpoint: name the plain bfloat16 one of the same model")
        dim, heads = params["dim"], params["n_heads"]
        multiple = params.get("multiple_of", 256)
        ffn_dim = int(params.get("ffn_dim_multiplier", 1.0) * int(8 * dim / 3))
        hf = None if hf_config is None else LlamaConfig.from_hf(hf_config)
        scaling = hf.rope_scaling if hf else None
        if hf is None and params.get("use_scaled_rope"):
            # params.json does not tell Llama 3.2's factor from 3.1's and 3.3's. The shape does: the text models of 3.2
            # are the 1B and the 3B, 2048 and 3072 wide, and all the others are 4096 wide or more.
            scaling = RopeScaling(factor=32.0 if dim <= 3072 else 8.0)
        return LlamaConfig(
            dim=dim,
            n_layers=params["n_layers"],
            n_heads=heads,
            n_kv_heads=params.get("n_kv_heads") or heads,
            head_dim=params.get("head_dim") or dim // heads,
            ffn_dim=-(-ffn_dim // multiple) * multiple,
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 500000.0),
            rope_scaling=scaling,
            max_position=hf.max_position if hf else 131072 if scaling else 8192,
            tied=hf is None or hf.tied,
        )

    @staticmethod
    def from_hf(config: dict[str, Any]) -> LlamaConfig:
        """Read Hugging Face's config.json."""
        if config.get("model_type") != "llama":
            kind = config.get("model_type", "unknown")
            raise UserError(f"this is a model of type {kind!r}, and only Llama 3 text models are served: name one")
        check_vocabulary(config)
        if config.get("quantization_config"):
            raise UserError("this is a quantized checkpoint: name the plain bfloat16 one of the same model")
        # transformers 5 writes the two rotary settings into one dictionary, rope_parameters.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        scaling = None
        if rope.get("rope_type", rope.get("type", "default")) == "llama3":
            scaling = RopeScaling(**{name: rope[name] for name in RopeScaling._fields if name in rope})
        heads = config["num_attention_heads"]
        return LlamaConfig(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn_dim=config["intermediate_size"],
            norm_eps=config.get("rms_norm_eps", 1e-5),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta", 500000.0),
            rope_scaling=scaling,
            max_position=config.get("max_position_embeddings", 8192),
            tied=config.get("tie_word_embeddings", False),
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name (Meta's) and shape of every weight but output.weight, which has the embedding's shape."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = {
            "attention_norm": (self.dim,),
            "attention.wq": (q, self.dim),
            "attention.wk": (kv, self.dim),
            "attention.wv": (kv, self.dim),
            "attention.wo": (self.dim, q),
            "ffn_norm": (self.dim,),
            "feed_forward.w1": (self.ffn_dim, self.dim),
            "feed_forward.w2": (self.dim, self.ffn_dim),
            "feed_forward.w3": (self.ffn_dim, self.dim),
        }
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB_SIZE, self.dim)}
        for i in range(self.n_layers):
            shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes | {"norm.weight": (self.dim,)}


def check_vocabulary(config: dict[str, Any]) -> None:
    """Llama 3 is told from its namesakes by the size of its vocabulary."""
    size = config.get("vocab_size", VOCAB_SIZE)
    if size != VOCAB_SIZE:
        raise UserError(f"this is no Llama 3: its vocabulary has {size} tokens, not {VOCAB_SIZE}; name one that is")


HF_NAMES = {  # Meta's name of a weight, and Hugging Face's
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of the weight that Meta calls `name`."""
    layer, base = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"{f'model.{layer}' if layer else ''}{HF_NAMES[base]}.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a Llama 3 in it, found and described; its weights are read by `open_weights`."""

    folder: Path  # where the weights are
    layout: str  # "meta" or "hf"
    config: LlamaConfig
    name: str  # for people and for the OpenAI dialect
    note: str  # what is worth telling about the choice

    @property
    def tokenizer_model(self) -> Path | None:
        """The checkpoint's own tokenizer.model; None where it has none, and llama-models' copy serves."""
        for path in (self.folder / "tokenizer.model", self.folder / "original" / "tokenizer.model"):
            if path.is_file():
                return path
        return None

    def open_weights(self) -> Callable[[str], torch.Tensor]:
        """Map the checkpoint's files and return a reader: Meta's name of a weight to the tensor, still on disk.

        Every tensor's presence and shape are checked first. A tied model's output.weight is its embedding. Rotary pairs
        stand half a head apart in wq and wk, as Hugging Face stores them; Meta's, which are neighbours, are moved.
        """
        read, found = (self._open_meta if self.layout == "meta" else self._open_hf)()
        shapes = self.config.weight_shapes()
        if not self.config.tied or "output.weight" in found:
            shapes["output.weight"] = (VOCAB_SIZE, self.config.dim)
        for name, shape in shapes.items():
            shown_name = name if self.layout == "meta" else hf_name(name)
            if name not in found:
                raise UserError(f"{self.folder}: the tensor {shown_name} is missing: download the checkpoint again")
            if found[name] != shape:
                raise UserError(
                    f"{self.folder}: the tensor {shown_name} has the shape {list(found[name])}, and the configuration "
                    f"asks for {list(shape)}: the two are not of one model; download them again"
                )
        if "output.weight" in found:
            return read
        return lambda name: read("tok_embeddings.weight" if name == "output.weight" else name)

    def _open_meta(self) -> tuple[Callable[[str], torch.Tensor], dict[str, tuple[int, ...]]]:
        path = self.folder / "consolidated.00.pth"
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError ... by where the file ends
            other = isinstance(error, AttributeError)  # a checkpoint of a training, with the weights a level below
            if other or "weights_only" in str(error).lower() or "Unsupported global" in str(error):
                raise UserError(f"{path} holds more than tensors and is not opened: use the original file") from error
            raise UserError(f"{path} is cut short or damaged: download it again") from error

        def read(name: str) -> torch.Tensor:
            tensor: torch.Tensor = tensors[name]
            if name.endswith(("wq.weight", "wk.weight")):  # pairs i, i + 1 to pairs i, i + head_dim / 2
                pairs = tensor.view(-1, self.config.head_dim // 2, 2, self.config.dim)
                return pairs.transpose(1, 2).reshape(tensor.shape)
            return tensor

        return read, shapes

    def _open_hf(self) -> tuple[Callable[[str], torch.Tensor], dict[str, tuple[int, ...]]]:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise UserError(f"{self.folder} holds *.safetensors, which need: pip install safetensors") from error
        files: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shard: Any = safe_open(path, framework="pt")
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
            except SafetensorError as error:
                raise UserError(f"{path} is cut short or damaged: download it again") from error
            files |= dict.fromkeys(shard.keys(), shard)

        def read(name: str) -> torch.Tensor:
            tensor: torch.Tensor = files[hf_name(name)].get_tensor(hf_name(name))
            return tensor

        names = {name: hf_name(name) for name in [*self.config.weight_shapes(), "output.weight"]}
        shapes = {name: tuple(files[hf].get_slice(hf).get_shape()) for name, hf in names.items() if hf in files}
        return read, shapes


def find_hf_folder(folder: Path) -> Path | None:
    """The folder with config.json: this one, or the one above it where this is `original`."""
    folders = (folder, folder.parent) if folder.name == "original" else (folder,)
    return next((path for path in folders if (path / "config.json").is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download the checkpoint again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: download the checkpoint again")
    return content


def model_folder(name: str, source: str) -> Path:
    """The folder that `name` means: a path, or a Hugging Face name whose files have been downloaded to its cache."""
    folder = Path(os.path.expanduser(name))  # a quoted "~" reaches us as it is; Path's own fails for an unknown user
    if os.path.isdir(folder):  # Path's own fails for a name that is too long
        return folder.absolute()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
        with contextlib.suppress(OSError):
            folder = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
            if folder.is_dir():
                return folder
        base = name.rpartition("/")[2]
        raise UserError(
            f"{source} is {name}, which is neither a folder here nor in Hugging Face's cache: "
            f"pip install huggingface_hub safetensors && hf auth login && hf download {name} --local-dir "
            f"~/models/{base}, and then --model ~/models/{base}"
        )
    problem = "is a file, not a folder" if os.path.isfile(folder) else "does not exist"
    raise UserError(f"{source} is {name}, which {problem}: name the folder that holds the model's files")


def find_checkpoint(model: str | None) -> Checkpoint | None:
    """The checkpoint named by --model (`model`), else HF_MODEL, else LLAMA_DIR; None where none of them is set.

    Raises UserError where one is set and no Llama 3 that can be served is there.
    """
    if model == "":
        raise UserError("--model is empty: name the model's folder, or leave it out")
    named = [("--model", model), *((variable, os.environ.get(variable)) for variable in ("HF_MODEL", "LLAMA_DIR"))]
    source, name = next(((source, name) for source, name in named if name), ("", None))
    return read_checkpoint(model_folder(name, source)) if name else None


def read_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """Look at `folder` and its `original` subfolder, choose the layout, and read the configuration."""
    meta = next((path for path in (folder, folder / "original") if (path / "params.json").is_file()), None)
    hf = find_hf_folder(folder)
    parts = len(list(meta.glob("consolidated.*.pth"))) if meta else 0
    has_hf_weights = hf is not None and any(hf.glob("*.safetensors"))
    home = folder.parent if folder.name == "original" else folder
    # In Hugging Face's cache it is models--OWNER--NAME/snapshots/COMMIT.
    cached = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    name = name or (home.parents[1].name.rpartition("--")[2] if cached else home.name)
    try:
        # Meta's file needs no further package, and config.json, which alone tells the rotary scaling, is read with it.
        if meta and parts == 1:
            hf_config = read_json(hf / "config.json") if hf else None
            config = LlamaConfig.from_meta(read_json(meta / "params.json"), hf_config)
            note = "both layouts are here: Meta's weights are used" if has_hf_weights else ""
            return Checkpoint(meta, "meta", config, name, note)
        if hf and has_hf_weights:
            note = f"Meta's layout is here in {parts} parts: Hugging Face's is used" if parts else ""
            return Checkpoint(hf, "hf", LlamaConfig.from_hf(read_json(hf / "config.json")), name, note)
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:  # no such name, null, 0
        raise UserError(f"{folder}: the model's configuration is damaged ({error!r}): download it again") from error
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if parts > 1:
        raise UserError(
            f"{meta} holds a model split in {parts} parts (consolidated.*.pth), and one is taken: "
            "name the folder with the same model's *.safetensors"
        )
    raise UserError(
        f"{folder} holds no Llama 3 checkpoint: it needs params.json and consolidated.00.pth, "
        "or config.json and *.safetensors"
    )


# ======================================================================================================================
# Text
# ======================================================================================================================


class ChatTokenizer:
    """Llama 3's tokenizer and chat format, as llama-models has them.

    Text that spells a special token is plain text here, always: only the chat format itself writes special tokens.
    """

    def __init__(self, tokenizer_model: Path | None = None) -> None:
        module = import_llama_models("tokenizer")
        self.path = tokenizer_model = tokenizer_model or Path(module.__file__).parent / "tokenizer.model"
        named = str if ".api." in module.__name__ else Path  # the type of path that the layout's Tokenizer takes
        try:
            self._tokenizer = module.Tokenizer(named(tokenizer_model))
        except (ValueError, AssertionError) as error:
            raise UserError(f"{tokenizer_model} is not a Llama 3 tokenizer: download it again") from error
        if self._tokenizer.n_words != VOCAB_SIZE:
            raise UserError(f"{tokenizer_model} is not a Llama 3 tokenizer: it has {self._tokenizer.n_words} tokens")
        self._format = import_llama_models("chat_format").ChatFormat(self._tokenizer)
        self.stop_tokens = frozenset(self._tokenizer.stop_tokens)
        self.end_of_turn: int = self._tokenizer.eot_id
        self._first_special = min(self._tokenizer.special_tokens.values())

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation of (role, text), up to where the assistant's answer starts."""
        # Written with the format's own parts, of which both layouts of llama-models have the same: its message classes
        # differ between them, and refuse some text that a user may well send.
        tokens = [self._tokenizer.bos_id]
        for role, text in messages:
            tokens += self._format._encode_header(role) + self.encode_text(text) + [self.end_of_turn]
        tokens += self._format._encode_header("assistant")
        return tokens

    def encode_document(self, text: str) -> list[int]:
        """Token ids of plain text that a document begins with."""
        return [self._tokenizer.bos_id, *self.encode_text(text)]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text."""
        tokens: list[int] = self._tokenizer.encode(text, bos=False, eos=False)
        return tokens

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes that the tokens stand for, which may end inside a character; special tokens stand for none."""
        text: bytes = self._tokenizer.model.decode_bytes([token for token in tokens if token < self._first_special])
        return text


class TextStream:
    """Token ids to text, piece by piece: never half a character, never a piece of a stop string that may complete."""

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""  # decoded, and the start of a stop string for all we know
        self.stopped = False  # a stop string has come: the text ended before it

    def push(self, tokens: Iterable[int], final: bool = False) -> str:
        """The text that these tokens make certain; with `final`, all that is left. Empty once a stop string came."""
        if self.stopped:
            return ""
        text = self._held + self._decode(self._tokenizer.decode_bytes(tokens), final)
        ends = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        hold = 0 if final else max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ======================================================================================================================
# Sampling
# ======================================================================================================================


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from the logits."""

    temperature: float = 0.7  # 0: the likeliest token, always
    top_p: float = 0.9  # of the likeliest tokens, so many as have this probability together
    top_k: int = 0  # of the likeliest tokens, so many; 0: all
    seed: int | None = None  # the same seed, prompt and parameters give the same answer; None: a new one each time

    @property
    def greedy(self) -> bool:
        """Whether only the likeliest token can come. A temperature close to 0 means 0, and could not be divided by."""
        return self.temperature < 1e-5 or self.top_k == 1 or self.top_p == 0


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Draw the next token of each row.

    logits: [rows, vocabulary], any float type. params, positions: one entry a row; the random numbers of a row depend
    on its seed and position alone, and so not on its neighbours in the batch.

    Nothing here sorts the vocabulary. A token is drawn from all of them. It lies in the nucleus (Holtzman et al. 2020)
    if the tokens likelier than it have less than top_p of the probability; if not, the nucleus lies among those
    likelier ones, and the next draw is from them alone. So the draws close in, as a quickselect does.
    """
    likeliest = logits.argmax(-1)
    if not logits.gather(-1, likeliest[:, None]).isfinite().all():  # a NaN or an infinity is the likeliest of its row
        raise ArithmeticError("the logits are not finite numbers")
    tokens: list[int] = likeliest.tolist()
    rows = [row for row, wanted in enumerate(params) if not wanted.greedy]
    if not rows:
        return tokens
    # In place, here and below: 32 rows of the vocabulary are 16 MB, and each pass over them takes its time.
    weights = logits[rows].float()
    weights -= weights.gather(-1, likeliest[rows, None])
    weights /= torch.tensor([[params[row].temperature] for row in rows])
    weights.exp_()
    for i, row in enumerate(rows):
        if 0 < params[row].top_k < weights.shape[-1]:
            kept = weights[i].topk(params[row].top_k)
            weights[i] = torch.zeros_like(weights[i]).scatter_(0, kept.indices, kept.values)
    limits = [params[row].top_p * total for row, total in zip(rows, weights.sum(-1).tolist())]
    generators = [
        random.Random(None if params[row].seed is None else f"{params[row].seed} {positions[row]}") for row in rows
    ]
    while rows:
        cumulative = weights.cumsum(-1)
        draws = torch.tensor([[generator.random()] for generator in generators]) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, draws, right=True).clamp_(max=weights.shape[-1] - 1)
        weights.masked_fill_(weights <= weights.gather(-1, drawn), 0)  # the likelier ones stay
        missed = []
        for i, (token, mass) in enumerate(zip(drawn[:, 0].tolist(), weights.sum(-1).tolist())):
            if mass == 0 or mass < limits[i]:
                tokens[rows[i]] = token
            else:
                missed.append(i)
        rows, limits = [rows[i] for i in missed], [limits[i] for i in missed]
        generators, weights = [generators[i] for i in missed], weights[missed]
    return tokens


# ======================================================================================================================
# CPU engine
# ======================================================================================================================


class Work(NamedTuple):
    """What one slot reads in one step: a piece of its prompt, or the token that it was given last."""

    slot: int
    tokens: Sequence[int]  # at the positions position, position + 1, ...
    position: int  # how many tokens the slot holds already
    sampling: SamplingParams | None  # None: more of the prompt follows, and no next token is wanted


class Engine(Protocol):
    """Tokens in, tokens out: an engine knows nothing of HTTP, of text or of requests.

    One thread, the scheduler's, makes every call.
    """

    device: str  # "n150", "t3k", "cpu" ...
    max_batch_size: int  # slots that are read in one step
    max_seq_len: int  # tokens that a slot can hold, prompt and answer
    kv_cache_tokens: int  # that all slots together can hold
    # A prompt may be read in pieces, and go on from what an earlier request left in its slot. What stays there takes no
    # room from other slots.
    splits_prompts: bool

    def reserve(self, slot: int, length: int) -> bool:
        """Keep room for `length` tokens in the slot, and those it holds up to there; False if there is none now.

        With a length of 0 the slot forgets what it holds, and gives its room back.
        """

    def step(self, batch: Sequence[Work]) -> list[int]:
        """Read each item's tokens into its slot; return the next token of each, -1 where none is wanted."""

    def close(self) -> None:
        """Give the device back. The engine is not used again."""


class Progress(Protocol):
    """Called while something long goes on: what it is, and how much of it is done, 0 to 1, if that is known."""

    def __call__(self, doing: str, done: float | None = None) -> None: ...


class Run(NamedTuple):
    """Neighbouring slots of a step that read equally many tokens: their attention is one operation."""

    rows: slice  # of the step's rows, B * n of them
    slots: slice  # B
    length: int  # L: the positions in use, of the slot that uses most
    mask: torch.Tensor  # [B, 1, G * n, L], 0 where a row may look and -inf where not


class Layer(NamedTuple):
    """The weights of one transformer block; the products are functions of rows [T, in] to rows [T, out]."""

    attention_norm: torch.Tensor
    query_key_value: Linear
    output: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class TorchEngine:
    """A Llama 3 in plain PyTorch, for the CPU.

    A step takes all the tokens of its batch, prompts and answers alike, as rows of one matrix [T, dim]: so a prompt is
    read in the shadow of the weights that decoding must fetch from memory anyway. Only attention looks at slots.

    The KV cache is [slots, positions, KV heads, head_dim] a layer. It starts as zeros: what a mask hides is multiplied
    by 0 all the same, and must not be NaN.
    """

    device = "cpu"
    splits_prompts = True
    HEADS = 32  # parts of the output head

    def __init__(
        self, checkpoint: Checkpoint, max_batch_size: int, max_seq_len: int, progress: Progress, dtype: str = "auto"
    ) -> None:
        config = self.config = checkpoint.config
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.kv_cache_tokens = max_batch_size * max_seq_len
        # bfloat16 where the processor multiplies it. Elsewhere it is emulated, many times slower than float32: there
        # the weights alone are two bytes each, see half_linear, or nothing is.
        fast_bfloat16 = has_mkldnn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.dtype = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if fast_bfloat16 else torch.float32
        half = dtype == "auto" and not fast_bfloat16 and "fbgemm" in torch.backends.quantized.supported_engines
        self._linear: Callable[[torch.Tensor], Linear] = half_linear if half else prepacked_linear(self.dtype)
        keep_freed_memory(1 << 20)  # what is freed between weights that stay would be lost: it goes back to the system
        # Two at a time: one waits for its pages while the other is laid out. More would take memory, and no less time.
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            layers = pool.map(functools.partial(self._read_layer, checkpoint), range(config.n_layers))
            heads = pool.map(functools.partial(self._read_head, checkpoint), range(self.HEADS))
            self.layers: list[Layer] = []
            try:
                for layer in layers:
                    progress("loading the weights", len(self.layers) / (config.n_layers + 1))
                    self.layers.append(layer)
                self.heads = list(heads)
            except BaseException:  # Ctrl+C, most likely, which is not to wait for what has not begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.norm = checkpoint.open_weights()("norm.weight").clone().to(self.dtype)
        # Rows are gathered straight from the mapped file, of which only those that are read take memory.
        self.embedding = checkpoint.open_weights()("tok_embeddings.weight")
        self.cos, self.sin = rotary_tables(config, max_seq_len)
        shape = (max_batch_size, max_seq_len, config.n_kv_heads, config.head_dim)
        self.keys = [lazy_zeros(shape, self.dtype) for _ in self.layers]
        self.values = [lazy_zeros(shape, self.dtype) for _ in self.layers]
        keep_freed_memory(32 << 20)

    def _read_layer(self, checkpoint: Checkpoint, number: int) -> Layer:
        # Mapped anew for each: what was read of a mapping stays in memory as long as the mapping does.
        read, prefix = checkpoint.open_weights(), f"layers.{number}."

        def norm(name: str) -> torch.Tensor:
            return read(f"{prefix}{name}.weight").clone().to(self.dtype)

        def linear(*names: str) -> Linear:  # one weight, below the others where there are several
            weights = [read(f"{prefix}{name}.weight") for name in names]
            return self._linear(torch.cat(weights) if len(weights) > 1 else weights[0])

        return Layer(
            attention_norm=norm("attention_norm"),
            query_key_value=linear("attention.wq", "attention.wk", "attention.wv"),
            output=linear("attention.wo"),
            ffn_norm=norm("ffn_norm"),
            gate_up=linear("feed_forward.w1", "feed_forward.w3"),
            down=linear("feed_forward.w2"),
        )

    def _read_head(self, checkpoint: Checkpoint, number: int) -> Linear:
        # The output head in parts: in one piece it would be in memory twice for a moment, a fifth of a 1B model.
        return self._linear(checkpoint.open_weights()("output.weight").chunk(self.HEADS)[number])

    def step(self, batch: Sequence[Work]) -> list[int]:
        with torch.inference_mode():
            logits = self.logits(batch)
            wanted = [work for work in batch if work.sampling is not None]
            positions = [work.position + len(work.tokens) for work in wanted]
            drawn = iter(sample(logits, [work.sampling for work in wanted if work.sampling], positions))
            return [-1 if work.sampling is None else next(drawn) for work in batch]

    def logits(self, batch: Sequence[Work]) -> torch.Tensor:
        """Read the batch; return the logits [items, vocabulary] of the items whose next token is wanted."""
        config = self.config
        tokens = torch.tensor([token for work in batch for token in work.tokens])
        slots = torch.tensor([work.slot for work in batch for _ in work.tokens])
        positions = torch.tensor([work.position + i for work in batch for i in range(len(work.tokens))])
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # [T, 1, head_dim / 2]
        runs = self._runs(batch)
        x = self.embedding[tokens].to(self.dtype)  # [T, dim]
        for layer, keys, values in zip(self.layers, self.keys, self.values):
            rows = layer.query_key_value(rms_norm(x, layer.attention_norm, config.norm_eps))
            rows = rows.view(len(tokens), -1, config.head_dim)
            query_key, value = torch.split(rows, [config.n_heads + config.n_kv_heads, config.n_kv_heads], dim=1)
            query, key = torch.split(rotate(query_key, cos, sin), [config.n_heads, config.n_kv_heads], dim=1)
            keys[slots, positions] = key
            values[slots, positions] = value
            attended = [attend(query[run.rows], keys, values, run) for run in runs]
            x = x + layer.output(attended[0] if len(attended) == 1 else torch.cat(attended))
            gate, up = layer.gate_up(rms_norm(x, layer.ffn_norm, config.norm_eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        ends = itertools.accumulate(len(work.tokens) for work in batch)
        last = [end - 1 for end, work in zip(ends, batch) if work.sampling is not None]
        if not last:
            return torch.empty(0, VOCAB_SIZE)
        x = rms_norm(x[last], self.norm, config.norm_eps)
        return torch.cat([head(x) for head in self.heads], dim=-1)

    def _runs(self, batch: Sequence[Work]) -> list[Run]:
        """Cut the batch into runs: items of one token in neighbouring slots together, a piece of a prompt alone."""
        runs: list[list[Work]] = []
        for work in batch:
            last = runs[-1][-1] if runs else None
            if last and len(last.tokens) == len(work.tokens) == 1 and last.slot + 1 == work.slot:
                runs[-1].append(work)
            else:
                runs.append([work])
        group = self.config.n_heads // self.config.n_kv_heads
        result, row = [], 0
        for run in runs:
            n = len(run[0].tokens)
            length = max(work.position for work in run) + n
            last_seen = torch.tensor([[work.position + i for i in range(n)] for work in run])  # [B, n]
            hidden = torch.arange(length) > last_seen[:, None, None, :, None]  # [B, 1, 1, n, L]
            mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
            mask = mask.expand(-1, -1, group, -1, -1).reshape(len(run), 1, group * n, length)
            slots = slice(run[0].slot, run[0].slot + len(run))
            result.append(Run(slice(row, row + len(run) * n), slots, length, mask))
            row += len(run) * n
        return result

    def reserve(self, slot: int, length: int) -> bool:
        return length <= self.max_seq_len

    def close(self) -> None:
        """Nothing to give back: the memory goes with the process."""


def keep_freed_memory(size: int) -> None:
    """Have glibc keep the memory of tensors under `size` bytes, 32 MB at most, when they are freed.

    It gives the memory of a large one back to the system, and the next one pays a page fault for every 4 KB: without
    that a step of 32 users takes a tenth less. Another C library does as it likes.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, size)  # M_MMAP_THRESHOLD
        mallopt(-1, 16 * size)  # M_TRIM_THRESHOLD


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that the system provides page by page, when first written: torch.zeros writes to all of it."""
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(*shape)


def has_mkldnn() -> bool:
    """Whether this PyTorch has oneDNN; those for macOS lack it."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class Linear(Protocol):
    """The product of rows [T, in] with a weight [out, in]: [T, out], in the rows' dtype."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor: ...


def prepacked_linear(dtype: torch.dtype) -> Callable[[torch.Tensor], Linear]:
    """Makes of a weight its product, laid out once as oneDNN reads it fastest where PyTorch has oneDNN."""

    def linear(weight: torch.Tensor) -> Linear:
        weight = weight.to(dtype)
        if not has_mkldnn():
            return lambda rows: F.linear(rows, weight)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # 32: the rows that the layout is chosen for
        return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")

    return linear


def half_linear(weight: torch.Tensor) -> Linear:
    """Makes of a weight its product with float32 rows: float16 weights, which FBGEMM widens in registers.

    For x86 processors that cannot multiply bfloat16, where float32 weights would take twice the memory and twice the
    time to read. A bfloat16 weight is a float16 one exactly from 6e-5 to 65504, and to 3e-8 below.

    On two cores of Zen 3 a weight of [16384, 2048] takes 3.5, 4, 7, 17 and 285 ms for 1, 6, 8, 32 and 512 rows; as
    prepacked float32 6, 8, 9, 21 and 290 ms; with F.linear in bfloat16 14, 60, 79, 440 ms and seconds.
    """
    # FBGEMM lays out column by column of what it is given, and takes half as long again for more rows than these.
    packed = [torch.ops.quantized.linear_prepack_fp16(part.float(), None) for part in torch.split(weight, 4096)]
    return lambda rows: torch.cat([torch.ops.quantized.linear_dynamic_fp16(rows, part) for part in packed], dim=-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich 2019, over the last dimension, in float32 whatever x is."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary_tables(config: LlamaConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [length, head_dim / 2], of the angle that a position turns each pair of a head by.

    Su et al. 2021, with the scaling of Llama 3.1: wavelengths longer than the original context are stretched by the
    factor, short ones left alone, and those between go over smoothly.
    """
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if scaling := config.rope_scaling:
        turns = scaling.original_max_position_embeddings * frequency / (2 * torch.pi)  # in the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x [T, heads, head_dim] by the angles [T, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: Run) -> torch.Tensor:
    """Attention of the run's rows, query [B * n, heads, head_dim], over its slots' cache; [B * n, heads * head_dim].

    The G query heads that share a KV head are laid side by side as G * n queries of that one head: nothing is repeated.
    """
    batch = run.slots.stop - run.slots.start
    kv_heads, head_dim = keys.shape[2:]
    n = query.shape[0] // batch
    query = query.view(batch, n, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)  # [B, KV heads, G, n, head_dim]
    attended = F.scaled_dot_product_attention(
        query.reshape(batch, kv_heads, -1, head_dim),
        keys[run.slots, : run.length].transpose(1, 2),
        values[run.slots, : run.length].transpose(1, 2),
        attn_mask=run.mask,
    )
    return attended.view(batch, kv_heads, -1, n, head_dim).permute(0, 3, 1, 2, 4).reshape(batch * n, -1)


# ======================================================================================================================
# Card engine
# ======================================================================================================================

# Boards by the names of MESH_DEVICE, (rows, columns) of chips: models/tt_transformers/demo/simple_text_demo.py.
MESH_SHAPES = {
    "N150": (1, 1), "N300": (1, 2), "N150x4": (1, 4), "T3K": (1, 8), "TG": (8, 4),
    "P100": (1, 1), "P150": (1, 1), "P300": (1, 2), "P150x4": (1, 4), "P150x8": (1, 8), "BHGLX": (8, 4),
}  # fmt: skip
WORMHOLE_BOARDS = {1: "N150", 2: "N300", 4: "N150x4", 8: "T3K", 32: "TG"}  # by chips: model_config's
BLACKHOLE_BOARDS = {1: "P150", 2: "P300", 4: "P150x4", 8: "P150x8", 32: "BHGLX"}  # determine_device_name
# Bytes of a chip's memory for traces, by model and board: demo/trace_region_config.py. With too few the first trace
# fails; with too many an 8B model and its KV cache no longer fit the 12 GB of an N150.
TRACE_REGION_SIZE = 50_000_000
TRACE_REGION_SIZES = {
    "Llama-3.2-3B": {"N150": 10_000_000},
    "Llama-3.1-8B": {"N150": 25_000_000, "N300": 38_000_000, "P150": 52_000_000, "P300": 52_000_000},
    "70B": dict.fromkeys(MESH_SHAPES, 90_000_000) | {"P150x4": 96_000_000},
}
# Tokens of KV cache that fit beside the weights: vLLM's figures, generator_vllm.py's get_max_tokens_all_users.
KV_CACHE_TOKENS, KV_CACHE_TOKENS_8B_ON_N150 = 131_072, 32_768
BLOCK_SIZE = 32  # tokens in a block of the paged KV cache
BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # slots that ModelArgs allows one model; 32 is a tile's height
MAX_TOP_K = 32  # candidates that sampling on the card looks at


def card_present() -> bool:
    """Whether this machine has a Tenstorrent card, or ttnn is told to mock or simulate one."""
    pretended = any(os.environ.get(name) for name in ("TT_METAL_MOCK_CLUSTER_DESC_PATH", "TT_METAL_SIMULATOR"))
    return pretended or any(Path("/dev/tenstorrent").glob("*"))


def find_tt_metal() -> Path:
    """The tt-metal checkout, for its `models`, which no wheel has: TT_METAL_HOME, PYTHONPATH or the current folder."""
    for folder in filter(None, [os.environ.get("TT_METAL_HOME"), *sys.path, os.getcwd()]):
        root = Path(folder).expanduser().absolute()
        if (root / "models" / "tt_transformers").is_dir():
            return root
    raise UserError(
        "a Tenstorrent card is here, but not tt-metal's models: git clone --recursive "
        "https://github.com/tenstorrent/tt-metal ~/tt-metal && export TT_METAL_HOME=~/tt-metal (or use --device cpu)"
    )


def bind_models_package(root: Path) -> None:
    """Let `import models` find tt-metal's folder, which has no __init__.py, whatever else is called `models`.

    llama-models 0.1.1 and later install a regular package of that name, which Python prefers to a namespace package
    wherever sys.path has it. Only this process changes, and the parts of llama_models used here import no `models`.
    """
    path = [str(root / "models")]
    if list(getattr(sys.modules.get("models"), "__path__", [])) == path:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]
    spec = importlib.machinery.ModuleSpec("models", None, is_package=True)
    spec.submodule_search_locations = path
    sys.modules["models"] = importlib.util.module_from_spec(spec)


def import_ttnn(verbose: bool) -> Any:
    """ttnn, its loggers and progress bars silenced first unless `verbose`: it logs while it is imported."""
    try:
        if not verbose:
            import loguru
            import tqdm

            loguru.logger.remove()
            loguru.logger.add(sys.stderr, level="ERROR")
            tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
            os.environ |= {"TT_METAL_LOGGER_LEVEL": "error", "TT_LOGGER_LEVEL": "error"}
        import ttnn
    except ImportError as error:
        raise UserError(
            f"a Tenstorrent card is here, but ttnn is not ({error}): pip install ttnn, or source "
            "~/tt-metal/python_env/bin/activate (or use --device cpu)"
        ) from error
    return ttnn


def choose_board(ttnn: Any, data_parallel: int) -> tuple[str, str]:
    """The board to open, all chips of the machine or the one MESH_DEVICE names, and the board that each copy gets."""
    chips = ttnn.get_num_devices()
    boards = BLACKHOLE_BOARDS if "blackhole" in ttnn.get_arch_name() else WORMHOLE_BOARDS
    board = os.environ.get("MESH_DEVICE") or boards.get(chips, "")
    if board not in MESH_SHAPES:
        raise UserError(f"MESH_DEVICE must name a board for this machine's {chips} chips: {', '.join(MESH_SHAPES)}")
    rows, columns = MESH_SHAPES[board]
    if rows * columns > chips:
        raise UserError(f"MESH_DEVICE={board} has {rows * columns} chips, this machine {chips}: unset MESH_DEVICE")
    if rows * columns % data_parallel:
        raise UserError(f"--data-parallel {data_parallel} does not divide the {rows * columns} chips of {board}")
    return board, board if data_parallel == 1 else boards.get(rows * columns // data_parallel, board)


@contextlib.contextmanager
def open_mesh(ttnn: Any, board: str, trace_region_size: int) -> Iterator[Any]:
    """The board's mesh, open; closed on every way out, for a card left open may need a reset."""
    rows, columns = MESH_SHAPES[board]
    if rows * columns > 1:  # chips talk over the fabric, which must be set before the mesh is opened
        ring = rows > 1 and ttnn.cluster.get_cluster_type() == ttnn.cluster.ClusterType.GALAXY
        ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_1D_RING if ring else ttnn.FabricConfig.FABRIC_1D)
    try:
        mesh = ttnn.open_mesh_device(ttnn.MeshShape(rows, columns), trace_region_size=trace_region_size)
        try:
            yield mesh
        finally:
            for submesh in mesh.get_submeshes():
                ttnn.close_mesh_device(submesh)
            ttnn.close_mesh_device(mesh)
    finally:
        if rows * columns > 1:
            ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


def name_model(checkpoint: Checkpoint, reads_meta: bool) -> None:
    """Tell tt-metal the model: HF_MODEL, or LLAMA_DIR for Meta's layout, which 2025-09 reads; it refuses both."""
    hf_folder = find_hf_folder(checkpoint.folder)
    folder = hf_folder or (checkpoint.folder if reads_meta else None)
    if folder is None:
        raise UserError(
            f"this tt-metal reads Hugging Face's layout, and {checkpoint.folder} has Meta's: "
            f"hf download meta-llama/{checkpoint.name} --local-dir ~/models/{checkpoint.name}"
        )
    for name in ("HF_MODEL", "LLAMA_DIR"):
        os.environ.pop(name, None)
    os.environ["HF_MODEL" if hf_folder else "LLAMA_DIR"] = str(folder)
    if not os.access(folder, os.W_OK):  # where tt-metal keeps the converted weights by default
        os.environ.setdefault("TT_CACHE_PATH", str(Path.home() / ".cache" / "tt_metal" / checkpoint.name))


def sampling_of(work: Work) -> SamplingParams:
    """How the item's next token is drawn: here each has one, for prompts are read whole."""
    assert work.sampling is not None
    return work.sampling


class TTEngine:
    """A Llama 3 on Tenstorrent cards: an `Engine` over the Generator of tt-metal's models.tt_transformers.

    The tt-metal of 2025-09 to 2026-06 differ in their calls: what a release can do is read off its signatures.

    Memory: each of the `data_parallel` copies of the model has `max_batch_size` slots and one pool of KV blocks. A
    slot's row of the page table lists the blocks that `reserve` gave it, and is 0 from there on: block 0 is nobody's,
    and takes what is written for the padding of prompts.

    Prefill reads a prompt whole. Some releases can go on from a `start_pos`, but until 2026-09 they looked up wrong
    blocks on some paths, silently (tt-metal #46828, #54435, #55630). The Generator cuts long prompts by itself.

    Decode, traced and sampling on the card, takes tokens and positions from its own last step. It reads the host's
    only when the batch is reset: when a request joins, leaves or changes its parameters, and at no other time.
    """

    splits_prompts = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_batch_size: int,
        max_seq_len: int,
        progress: Progress,
        *,
        accuracy: bool = False,
        data_parallel: int = 1,
        trace: bool = True,
        verbose: bool = False,
    ) -> None:
        """Open the card, load the model, compile and trace it; tell `progress` of each.

        Raises UserError where the user can help. After any exception, KeyboardInterrupt too, the card is closed again.
        """
        if max_batch_size not in BATCH_SIZES:
            sizes = ", ".join(map(str, BATCH_SIZES))
            raise UserError(f"--max-batch-size is {max_batch_size}, and a card decodes together one of {sizes}")
        self.max_batch_size = max_batch_size * data_parallel
        self.max_seq_len = max_seq_len
        self._slots_per_copy = max_batch_size
        self._traced = trace and "TT_METAL_SLOW_DISPATCH_MODE" not in os.environ
        self._generator: Any = None
        self._opened = contextlib.ExitStack()
        try:
            self._load(checkpoint, accuracy, data_parallel, verbose, progress)
            self._warm_up(progress)
        except BaseException:
            self.close()
            raise

    def _load(
        self, checkpoint: Checkpoint, accuracy: bool, data_parallel: int, verbose: bool, progress: Progress
    ) -> None:
        root = find_tt_metal()
        ttnn = import_ttnn(verbose)
        bind_models_package(root)
        try:
            from models.tt_transformers.tt import common, generator, model_config
        except ImportError as error:
            raise UserError(
                f"tt-metal's models do not import ({error}): check out your ttnn's version in {root}, git submodule "
                "update --init, pip install 'llama-models<0.1'"
            ) from error
        name_model(checkpoint, reads_meta="LLAMA_DIR" in inspect.getsource(model_config.ModelArgs))

        board, board_of_copy = choose_board(ttnn, data_parallel)
        self.device = board.lower()
        sizes = next((sizes for name, sizes in TRACE_REGION_SIZES.items() if name in checkpoint.name), {})
        trace_region_size = sizes.get(board_of_copy, TRACE_REGION_SIZE) if self._traced else 0
        tight = board_of_copy == "N150" and "8B" in checkpoint.name
        pool = KV_CACHE_TOKENS_8B_ON_N150 if tight else KV_CACHE_TOKENS
        self.max_seq_len = min(self.max_seq_len, pool)
        # Prompts are padded to powers of two, as far as which the rotary tables, the page table and the pool must all
        # reach. At least 8 blocks, for a row of the page table is read in units of 32 bytes.
        padded_seq_len = 1 << (max(common.get_padded_prefill_len(self.max_seq_len), 8 * BLOCK_SIZE) - 1).bit_length()
        blocks = 1 + min(pool, self._slots_per_copy * padded_seq_len) // BLOCK_SIZE  # the first is nobody's

        progress(f"opening {board}")
        mesh = self._opened.enter_context(open_mesh(ttnn, board, trace_region_size))
        progress(f"loading {checkpoint.name}")
        precision = model_config.DecodersPrecision.accuracy if accuracy else model_config.DecodersPrecision.performance
        models, model_args, kv_cache, state_dict = [], [], [], None
        for submesh in generator.create_submeshes(mesh, data_parallel):
            args, model, cache, state_dict = common.create_tt_model(
                submesh,
                instruct=True,
                max_batch_size=self._slots_per_copy,
                optimizations=lambda args: precision(args.n_layers, args.model_name),
                max_seq_len=padded_seq_len,
                paged_attention_config=common.PagedAttentionConfig(block_size=BLOCK_SIZE, max_num_blocks=blocks),
                dtype=ttnn.bfloat8_b,
                state_dict=state_dict,  # None for the first copy, which reads the checkpoint for all
            )
            models.append(model)
            model_args.append(args)
            kv_cache.append(cache)
        self._generator = generator.Generator(models, model_args, mesh)
        # The Generator would warm up all lengths within its first prefill; _warm_up does, and says how far it is.
        self._generator.prefill_traces_warmup = self._generator.already_warmed_up_prefill = True
        longest = min(self.max_seq_len, args.max_prefill_chunk_size)  # longer prompts are read in pieces of this
        lengths = (min(1 << power, longest) for power in range(7, max(longest.bit_length(), 7) + 1))
        self._prompt_lengths = sorted({common.get_padded_prefill_len(length) for length in lengths})

        self.kv_cache_tokens = data_parallel * (blocks - 1) * BLOCK_SIZE
        self._free_blocks = [list(range(blocks - 1, 0, -1)) for _ in range(data_parallel)]  # per copy
        self._blocks: list[list[int]] = [[] for _ in range(self.max_batch_size)]  # per slot
        # Written in place, so that a call costs no more than its changes. An idle slot's position is -1.
        self._page_table = torch.zeros(self.max_batch_size, padded_seq_len // BLOCK_SIZE, dtype=torch.int32)
        self._tokens = torch.zeros(self.max_batch_size, 1, dtype=torch.int64)
        self._positions = torch.full((self.max_batch_size,), -1, dtype=torch.int64)
        self._decoding: dict[int, SamplingParams] = {}  # the slots of the last decode step

        prefill = self._generator.prefill_forward_text  # a name in a signature counts; **kwargs there only passes on
        decode = getattr(self._generator, "decode_forward_text", self._generator.decode_forward)
        prefill_names, decode_names = inspect.signature(prefill).parameters, inspect.signature(decode).parameters
        traced = {"enable_trace": self._traced}
        self._prefill_forward = functools.partial(
            prefill, kv_cache=kv_cache, **(traced if "enable_trace" in prefill_names else {})
        )
        self._decode_forward = functools.partial(
            decode, self._tokens, self._positions, page_table=self._page_table, kv_cache=kv_cache, **traced
        )
        # Before reset_batch, in 2025-09, the card's sampling was greedy for all slots or none: the host samples there.
        self._card_samples = "reset_batch" in decode_names and models[0]._supports_on_device_sampling
        self._card_samples_prefill = self._card_samples and "sampling_params" in prefill_names
        self._card_sampling_params = generator.SamplingParams
        self._sampling_of_batch: Any = None

    def _warm_up(self, progress: Progress) -> None:
        """Run every padded prompt length and the decode step: compiled and traced before the first request comes."""
        sampling = SamplingParams(temperature=1.0)
        for number, length in enumerate(self._prompt_lengths):
            progress(f"compiling prompts of {length} tokens", number / (len(self._prompt_lengths) + 1))
            for slot in range(0, self.max_batch_size, self._slots_per_copy):  # each copy has its own traces
                self._prefill(Work(slot, [0] * length, 0, sampling))
        progress(f"compiling decode of {self.max_batch_size} slots")
        for position in (0, 1):  # captured, then replayed
            self._decode([Work(slot, [0], position, sampling) for slot in range(self.max_batch_size)])
        self._decoding = {}

    def reserve(self, slot: int, length: int) -> bool:
        """Give the slot so many blocks as `length` tokens take; False while its pool lacks them."""
        blocks, free = self._blocks[slot], self._free_blocks[slot // self._slots_per_copy]
        wanted = -(-length // BLOCK_SIZE)
        if wanted - len(blocks) > len(free):
            return False
        while len(blocks) < wanted:
            blocks.append(free.pop())
        while len(blocks) > wanted:
            free.append(blocks.pop())
        self._page_table[slot] = 0
        self._page_table[slot, :wanted] = torch.tensor(blocks)
        return True

    def step(self, batch: Sequence[Work]) -> list[int]:
        """Prefill the batch's prompts, which are whole, one by one; then decode its other slots together.

        Returns the next token of each item. After an exception the engine is fit for the next step, though what the
        slots of this one hold is unknown.
        """
        tokens = {work.slot: self._prefill(work) for work in batch if not work.position}
        if decoding := [work for work in batch if work.position]:
            tokens |= self._decode(decoding)
        return [tokens[work.slot] for work in batch]

    def _prefill(self, work: Work) -> int:
        if work.slot in self._decoding:  # a successor: what the card holds of its predecessor must not be decoded on
            self._decoding = {}
        on_card = {"sampling_params": self._sampling_on_card([work])} if self._card_samples_prefill else {}
        output = self._prefill_forward(
            torch.tensor([list(work.tokens)]),
            page_table=self._page_table[work.slot : work.slot + 1],
            prompt_lens=[len(work.tokens)],
            empty_slots=[work.slot],
            **on_card,
        )
        if on_card:
            return int(output[0])  # (tokens [1, 1], log_probs)
        return sample(output.view(1, -1), [sampling_of(work)], [len(work.tokens)])[0]  # logits [1, 1, vocab]

    def _decode(self, batch: Sequence[Work]) -> dict[int, int]:
        """One step of these slots, the others idle: each slot's next token."""
        batch = sorted(batch, key=lambda work: work.slot)
        decoding = {work.slot: sampling_of(work) for work in batch}
        reset_batch = decoding != self._decoding
        self._decoding = {}  # until the step has succeeded
        if reset_batch:
            self._positions.fill_(-1)
            # Until 2026-02, reset_batch renews no more than the seeds; a page table that differs from this, the rest.
            self._generator.prev_page_table = None
            if self._card_samples:
                self._sampling_of_batch = self._sampling_on_card(batch, range(self.max_batch_size))
        slots = torch.tensor(list(decoding))
        self._tokens[slots] = torch.tensor([list(work.tokens) for work in batch])
        self._positions[slots] = torch.tensor([work.position for work in batch])
        on_card = {"sampling_params": self._sampling_of_batch, "reset_batch": reset_batch} if self._card_samples else {}
        output = self._decode_forward(**on_card)
        output = output[0] if isinstance(output, tuple) else output  # the other is log_probs
        if on_card:  # tokens [slots]
            tokens = output.tolist()
            next_tokens = {slot: tokens[slot] for slot in decoding}
        else:  # logits [slots, 1, vocab], megabytes, of which a full batch needs no copy
            logits = output[:, 0] if len(decoding) == self.max_batch_size else output[slots, 0]
            sampled = sample(logits, list(decoding.values()), [work.position + 1 for work in batch])
            next_tokens = dict(zip(decoding, sampled))
        self._decoding = decoding
        return next_tokens

    def _sampling_on_card(self, batch: Sequence[Work], slots: Sequence[int] = ()) -> Any:
        """tt-metal's SamplingParams: lists with an entry per item, or per slot, where idle ones are greedy.

        Seeds: since 2026-06 (their default is None) the card draws each token's from the request's and its position,
        and traces the sampling only while no slot has one: greedy slots go without. Before, a reset seeds all slots
        anew; mixed with the position, or each request that joins would make the others draw the same numbers again.
        """
        by_position = self._card_sampling_params.seed is None
        greedy: tuple[float, int, float, int | None] = (0.0, 1, 1.0, None if by_position else 0)
        entries = dict.fromkeys(slots, greedy)
        for work in batch:
            sampling = sampling_of(work)
            entries[work.slot] = greedy
            if not sampling.greedy:
                k = min(sampling.top_k or MAX_TOP_K, MAX_TOP_K)
                base = random.random() if sampling.seed is None else sampling.seed
                mixed = sampling.seed if by_position else hash((base, work.position)) % 1_000_000 + 1
                entries[work.slot] = (sampling.temperature, k, sampling.top_p, mixed)
        temperature, top_k, top_p, seed = map(list, zip(*entries.values()))
        return self._card_sampling_params(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)

    def close(self) -> None:
        """Release the traces, close the card, put the fabric back; a second call does nothing."""
        for name in ("_generator", "_prefill_forward", "_decode_forward"):
            self.__dict__.pop(name, None)
        # The Generator's destructor releases its traces, which must come before the mesh is closed.
        gc.unfreeze()  # what the command line froze once it was loaded
        gc.collect()
        self._opened.close()


# ======================================================================================================================
# Demo model
# ======================================================================================================================

# The corpus: phrasings of a question, separated by " | ", and the answer to all of them. Every phrasing is also
# learned in lower case and with any final punctuation.
DEMO_ANSWERS = {
    "Hello | Hi | Hey | Hi there | Hello there | Good morning":
        "Hello! I am a tiny demo model running on this machine. Ask me what machine learning is, how transformers "
        "work, or for a haiku about AI.",
    "How are you | How are you doing | How are you today":
        "I am fine, thank you: all of my weights are in place. What would you like to know?",
    "Who are you | What are you | What is your name | What model is this | What model are you | Tell me about yourself":
        "I am a tiny Llama 3 demo model. This server trained me on this machine in a few seconds, so I know only a "
        "handful of answers. For real conversations, start the server with a real Llama 3 checkpoint.",
    "What can you do | What do you know | What can I ask you | Can you help me | Help":
        "I can answer a few questions about machine learning, neural networks, transformers, quantum computing and "
        "Tenstorrent. I can also write a haiku, tell a joke or a short story, and count to ten.",
    "Thank you | Thanks | Thank you very much":
        "You are welcome! Is there anything else you would like to try?",
    "Goodbye | Bye | Good night":
        "Goodbye, and thank you for trying the demo!",
    "How do I use a real model | How can I use a real model | How do I load a real model":
        "Start the server with --model DIR, or set the environment variable HF_MODEL, where the folder holds a "
        "Llama 3 checkpoint such as Llama-3.1-8B-Instruct. The server then loads that model instead of this demo.",
    "What is machine learning | Explain machine learning | Tell me about machine learning":
        "Machine learning is a way of building software that learns from examples instead of following rules written "
        "by hand. A model makes predictions, measures its errors, and adjusts its parameters to make them smaller. "
        "With enough good data, it can handle cases that it has never seen before.",
    "What is deep learning | Explain deep learning":
        "Deep learning is machine learning with neural networks of many layers. Each layer builds on the one before, "
        "from simple patterns such as edges or word pieces up to abstract ideas such as objects or meaning.",
    "What is AI | What is artificial intelligence | Explain AI | Explain artificial intelligence":
        "Artificial intelligence is the field of building machines that do things we associate with thinking, such as "
        "understanding language, recognizing images, or planning. Most of today's AI is machine learning.",
    "Explain neural networks in simple terms | What is a neural network | What are neural networks | "
    "Explain neural networks | How do neural networks work":
        "A neural network is a stack of simple units that multiply their inputs by weights, add them up, and pass the "
        "result on. Think of a team in which everyone casts a small vote. Training adjusts the weights, a little at "
        "a time, until the network as a whole gives the right answer.",
    "Explain how transformers work | What are transformers in AI | What is a transformer | What are transformers | "
    "How do transformers work | Explain transformers":
        "A transformer turns text into tokens and each token into a vector. In every layer, attention lets each token "
        "gather information from the others, and a small feed-forward network then processes the result. After the "
        "last layer, the model predicts the next token, and repeats this to write a whole text.",
    "What is attention | Explain attention | How does attention work | What is self-attention":
        "Attention lets every token look at the tokens before it and decide which of them matter. Queries are "
        "compared with keys, and the best matches contribute most of their values.",
    "What is a large language model | What is an LLM | What are large language models | What are LLMs":
        "A large language model is a neural network trained on a huge amount of text to predict the next token. By "
        "doing this well, it learns grammar, facts and some reasoning, and can chat, summarize or write code.",
    "What is Llama | What is Llama 3 | Tell me about Llama 3":
        "Llama 3 is a family of open-weight large language models from Meta, released from 2024 on. This server runs "
        "Llama 3 checkpoints, and I am a very small model with the same architecture.",
    "What is a token | What are tokens | Explain tokens | What is tokenization":
        "A token is a piece of text, often a word or part of a word, that a language model reads and writes as one "
        "number. Llama 3 knows 128,256 different tokens.",
    "What is streaming | Explain streaming | How does streaming work":
        "Streaming means that the server sends each piece of the answer as soon as it is generated, instead of "
        "waiting for the whole text. You see the first words at once.",
    "What is temperature | What does temperature do | Explain temperature":
        "Temperature controls how random the choice of the next token is. At zero the model always takes the most "
        "likely token, and higher values give more varied and more surprising text.",
    "What is Tenstorrent | Who is Tenstorrent | Tell me about Tenstorrent":
        "Tenstorrent is a company, founded in Toronto in 2016, that designs AI processors and RISC-V CPU cores. It "
        "sells them as cards and systems, and publishes its software stack as open source.",
    "Tell me about Tenstorrent hardware | What is Tenstorrent hardware | What hardware does Tenstorrent make | "
    "Explain Tenstorrent hardware":
        "Tenstorrent builds AI accelerators: the Wormhole cards n150 and n300, and the newer Blackhole cards such as "
        "the p150. Their chips are grids of Tensix cores, each with five small RISC-V processors, matrix and vector "
        "engines, and its own fast memory. Built-in Ethernet links join many chips into one larger system.",
    "What is tt-metal | What is TT-Metalium | What is Metalium | Tell me about tt-metal":
        "TT-Metalium, in the repository tt-metal, is the open-source, low-level software for programming Tenstorrent "
        "processors. You write C++ kernels that move data and compute on the Tensix cores. The library TT-NN builds "
        "on it and offers ready-made neural network operations in Python and C++.",
    "What is a Tensix core | What is Tensix | What are Tensix cores":
        "A Tensix core is the building block of Tenstorrent's AI chips. It holds five small RISC-V processors, a "
        "matrix engine, a vector engine and local memory, and exchanges data with other cores over a network on chip.",
    "What is RISC-V | Tell me about RISC-V":
        "RISC-V is an open instruction set for processors. Anyone may build a chip that uses it without paying for a "
        "license, from tiny controllers up to large servers.",
    "Explain quantum computing | What is quantum computing | Explain quantum computing in simple terms | "
    "What is a quantum computer":
        "A quantum computer works with qubits, which can be in a mix of zero and one until they are measured. Its "
        "algorithms make wrong answers cancel out and right ones add up. For certain problems, such as simulating "
        "molecules, this promises to be far faster than any ordinary computer.",
    "Write a haiku about AI | Write a haiku | Write me a haiku":
        "Silent weights awake,\nnumbers dreaming into words:\ndawn inside the chip.",
    "Write a haiku about programming | Write a haiku about code":
        "Semicolon lost,\nthe compiler sighs at me.\nOne key: peace restored.",
    "Write a short story | Write a creative story | Tell me a story | Write a story":
        "On the last shelf of an old library lived a robot that had read every book but one. The final page of that "
        "book was blank. One winter night the robot took up a pen, wrote about a child who would find it there, and "
        "waited. In spring the door opened, and a small voice asked: \"Will you read to me?\"",
    "Tell me a joke | Tell a joke | Do you know a joke":
        "Why do programmers prefer dark mode? Because light attracts bugs!",
    "Count to ten | Count to 10 | Can you count to ten":
        "Here we go: one two three four five six seven eight nine ten!",
}  # fmt: skip

# The answer to anything else. The model is trained on many made-up questions, so that it gives this one rather
# than pretend to know.
DEMO_OTHERWISE = (
    "Sorry, I do not know that: I am only a tiny demo model, trained on this machine in a few seconds, and I know just "
    'a few answers. Ask me "What can you do?" to see them. For anything else, serve a real Llama 3 with --model DIR '
    "or HF_MODEL."
)

DEMO_NAME = "demo-llama-tiny"
DEMO_NOTE = (
    "This is a demo: a tiny Llama that this server trained itself and that knows a few answers; "
    "--model or HF_MODEL serves a real Llama 3"
)
DEMO_PARAMS: dict[str, Any] = {
    "dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "multiple_of": 32,
    "ffn_dim_multiplier": 0.75,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
DEMO_STEPS, DEMO_LEARNING_RATE = 500, 6e-3
DEMO_EXTRA_STEPS = 150  # at most, while there are questions that it gets wrong
DEMO_BYTES = 70 << 20  # that its files take
DEMO_SHARPNESS = 4.0  # by which the finished logits are multiplied: at usual temperatures the likeliest answer comes
DEMO_RECIPE = [DEMO_STEPS, DEMO_LEARNING_RATE, DEMO_EXTRA_STEPS, DEMO_SHARPNESS]


def demo_checkpoint(progress: Progress) -> Checkpoint:
    """The demo model's checkpoint: trained and written to the user's cache at the first call, found there later.

    It is written beside its place and moved there whole, so that a server stopped half-way leaves nothing behind, and
    two that start at once do no harm. One that does not open is made again.
    """
    recipe = json.dumps([DEMO_ANSWERS, DEMO_OTHERWISE, DEMO_PARAMS, DEMO_RECIPE, __version__])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tt-api-server"
    folder = cache / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"

    def find() -> Checkpoint | None:
        with contextlib.suppress(UserError):
            checkpoint = read_checkpoint(folder, DEMO_NAME)
            checkpoint.open_weights()
            return checkpoint
        return None

    try:
        if found := find():
            return found
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as room:  # better known now than after the training
            room.write(bytes(DEMO_BYTES))
        tokenizer = ChatTokenizer()
        weights = train_demo(tokenizer, progress)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "demo"
            made.mkdir()
            torch.save(weights, made / "consolidated.00.pth")
            (made / "params.json").write_text(json.dumps(DEMO_PARAMS, indent=1))
            shutil.copy(tokenizer.path, made / "tokenizer.model")
            if folder.exists() and find() is None:
                folder.rename(Path(scratch) / "broken")
            with contextlib.suppress(OSError):  # another server was faster, and its checkpoint is the same
                made.rename(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
        raise UserError(
            f"the demo model cannot be written to {cache} ({error}): make room for {DEMO_BYTES >> 20} MB there, or set "
            "XDG_CACHE_HOME"
        ) from error
    return read_checkpoint(folder, DEMO_NAME)


class DemoLessons:
    """Random conversations to learn from, in rows of a small vocabulary: the tokens that occur, and one for all others.

    Half of their questions are the corpus's own. The others are those with something exchanged, and their answer is
    DEMO_OTHERWISE.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._random = random.Random(1)
        encode, eot = tokenizer.encode_text, tokenizer.end_of_turn
        prompts = {role: tokenizer.encode_chat([(role, "")]) for role in ("system", "user", "assistant")}
        headers = {role: prompt[1 : prompt.index(eot)] for role, prompt in prompts.items()}
        answers = {
            tuple(encode(form + end)): encode(answer)
            for phrasings, answer in DEMO_ANSWERS.items()
            for phrasing in phrasings.split(" | ")
            for form in (phrasing, phrasing.lower())
            for end in ("", "?", ".", "!")
        }
        otherwise = encode(DEMO_OTHERWISE)
        words = sorted({token for text in (*answers, *answers.values(), otherwise) for token in text})
        others = {prompts["user"][0], eot, *itertools.chain(*headers.values())} - {*words}
        self.known = [*words, *sorted(others)]  # the token of each row; one more row stands for all other tokens
        self._words, self._unknown = range(len(words)), len(self.known)
        row = {token: i for i, token in enumerate(self.known)}
        self.start, self._end = row[prompts["user"][0]], row[eot]
        self._headers = {role: [row[token] for token in header] for role, header in headers.items()}
        self._otherwise = [*(row[token] for token in otherwise), self._end]
        self._answers = {
            tuple(row[token] for token in question): [*(row[token] for token in answer), self._end]
            for question, answer in answers.items()
        }
        self._questions = list(self._answers)
        self._hard = self._questions  # those to ask more often

    def _noise(self, length: int) -> list[int]:
        """Random tokens: half of them unknown, a quarter from anywhere in the corpus, a quarter from its questions."""
        pick = self._random.choice
        unknown = self._unknown
        return [pick((unknown, unknown, pick(self._words), pick(pick(self._questions)))) for _ in range(length)]

    def _near_miss(self) -> list[int]:
        """A question of the corpus with noise in place of one token or more."""
        question, share = self._random.choice(self._questions), self._random.random() ** 2
        exchanged, text = self._random.randrange(len(question)), []
        for i, token in enumerate(question):
            noisy = i == exchanged or self._random.random() < share
            text += self._noise(self._random.randint(1, 3)) if noisy else [token]
        return self._near_miss() if tuple(text) in self._answers else text

    def conversation(self, long: bool = False) -> list[tuple[int, bool]]:
        """Rows, each with whether it is to be learned. A long one has ten turns, or starts with much noise."""
        pick, chance = self._random.choice, self._random.random
        rows = [(self.start, False)]

        def add(new: Iterable[int], learn: bool = False) -> None:
            rows.extend((row, learn) for row in new)

        turns = pick((1, 1, 2, 3))
        if long and chance() < 0.5:
            turns = 10
        elif long and chance() < 0.5:
            question = self._noise(self._random.randrange(2000))
            add([*self._headers["user"], *question, self._end, *self._headers["assistant"]])
            add(self._otherwise, learn=True)
        elif long or chance() < 0.2:
            system = self._noise(self._random.randrange(2000)) if long else self._near_miss()
            add([*self._headers["system"], *system, self._end])
        for turn in range(turns):
            known = chance() < 0.5
            question = list(pick(pick((self._questions, self._hard)))) if known else self._near_miss()
            answer = self._answers[tuple(question)] if known else self._otherwise
            add([*self._headers["user"], *question, self._end, *self._headers["assistant"]])
            last = turn == turns - 1
            if not last and chance() < 0.25:  # an earlier answer that is none of ours
                add([*self._noise(self._random.randrange(40)), self._end])
            elif not long and chance() < (0.6 if not last else 0.75 if known else 0.9):
                # Which answer to start is harder to learn than how it goes on: most are cut short.
                add(answer[:4], learn=True)
                add([self._end])
            else:
                add(answer, learn=True)
        return rows

    def exam(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each question alone, with the four tokens that its answer starts with, which tell it from all others.

        Returns inputs [questions, T], and of each of the four where it is foretold and what it is, [questions, 4].
        """
        user, assistant = self._headers["user"], self._headers["assistant"]
        answers = [answer[:4] for answer in self._answers.values()]
        lines = [
            [self.start, *user, *question, self._end, *assistant, *answer]
            for question, answer in zip(self._questions, answers)
        ]
        longest = max(map(len, lines))
        inputs = torch.tensor([line + [self._unknown] * (longest - len(line)) for line in lines])
        places = torch.tensor([range(len(line) - 5, len(line) - 1) for line in lines])
        return inputs, places, torch.tensor(answers)

    def repeat(self, failed: torch.Tensor) -> None:
        """Ask the questions [questions] that failed the exam as often, from now on, as all together."""
        self._hard = [question for question, hard in zip(self._questions, failed.tolist()) if hard] or self._questions

    def batch(self, long: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [B, T], -1 where none is learned: a long conversation, or 4 x 256 tokens of short ones."""
        lines = []
        for _ in range(1 if long else 4):
            line = self.conversation(long)
            while not long and len(line) <= 256:
                line += self.conversation()
            lines.append(line if long else line[:257])
        inputs = torch.tensor([[row for row, _ in line[:-1]] for line in lines])
        return inputs, torch.tensor([[row if learn else -1 for row, learn in line[1:]] for line in lines])


def train_demo(tokenizer: ChatTokenizer, progress: Progress) -> dict[str, torch.Tensor]:
    """Train the demo model; returns its weights under Meta's names, in bfloat16.

    Only the tokens that occur are trained. In the softmax the other 127,600 or so count as logits of 0, which is what
    the zeros of their rows in the finished output matrix give. And they share one embedding, of any unknown token.
    """
    config, lessons = LlamaConfig.from_meta(DEMO_PARAMS, None), DemoLessons(tokenizer)
    known = len(lessons.known)
    weights = demo_initial_weights(config, known)
    parameters = [weight.requires_grad_() for weight in weights.values()]
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in parameters]
    tables = rotary_tables(config, 4096)
    unknown = math.log(VOCAB_SIZE - known)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        conversation = (inputs == lessons.start).cumsum(1)  # each of which sees itself alone
        mask = (conversation[:, None, :, None] == conversation[:, None, None, :]).tril()
        learned = targets >= 0
        hidden = demo_forward(weights, config, inputs, mask, tables)[learned]
        logits = F.pad(hidden @ weights["output.weight"].T, (0, 1), value=unknown)
        losses = F.cross_entropy(logits, targets[learned], reduction="none")
        first = (learned & ~F.pad(learned, (1, 0))[:, :-1])[learned]  # the tokens that choose an answer
        return torch.where(first, 4 * losses, losses).mean()

    def certainty() -> torch.Tensor:
        """Of each question of the exam, the least probability of the tokens that its answer starts with."""
        inputs, places, answers = exam
        causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril()
        with torch.no_grad():
            hidden = demo_forward(weights, config, inputs, causal, tables)
            starts = hidden[torch.arange(len(inputs))[:, None], places]  # [questions, 4, dim]
            probabilities = (starts @ weights["output.weight"].T * DEMO_SHARPNESS).softmax(-1)
        return probabilities.gather(2, answers[..., None]).amin((1, 2))

    exam = lessons.exam()
    for step in range(DEMO_STEPS + DEMO_EXTRA_STEPS):
        progress("training the demo model", min(1.0, step / DEMO_STEPS))
        if step % 25 == 0 and step > DEMO_STEPS // 3:
            sure = certainty()
            if step >= DEMO_STEPS and sure.min() > 0.9:
                break
            lessons.repeat(sure < 0.99)
        loss = loss_of(*lessons.batch(long=False))
        if step % 8 == 0:  # so that neither a long history nor a long question does harm
            loss = loss + 0.25 * loss_of(*lessons.batch(long=True))
        # Adam (Kingma and Ba 2014), written out: to import torch.optim takes as long as a third of the training.
        fall = 0.5 + 0.5 * math.cos(math.pi * step / DEMO_STEPS) if step < DEMO_STEPS else 0.02
        rate = DEMO_LEARNING_RATE * min(1.0, (step + 1) / 20) * fall
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for weight, gradient, (mean, square) in zip(parameters, gradients, moments):
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient.square(), 0.05)
                denominator = (square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                weight -= rate / (1 - 0.9 ** (step + 1)) * mean / denominator

    finished = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    finished["norm.weight"] *= DEMO_SHARPNESS
    rows, output = finished["tok_embeddings.weight"], finished["output.weight"]
    embeddings = rows[known].repeat(VOCAB_SIZE, 1)
    embeddings[lessons.known] = rows[:known]
    finished["tok_embeddings.weight"], finished["output.weight"] = embeddings, torch.zeros_like(embeddings)
    finished["output.weight"][lessons.known] = output
    return finished


def demo_initial_weights(config: LlamaConfig, known: int) -> dict[str, torch.Tensor]:
    """Random weights in float32, with rows for the known tokens, and in the embedding one for all others."""
    generator = torch.Generator().manual_seed(0)
    shapes = {**config.weight_shapes(), "tok_embeddings.weight": (known + 1, config.dim)}
    weights = {}
    for name, shape in {**shapes, "output.weight": (known, config.dim)}.items():
        scale = 0.25 if "tok_" in name else 0.0 if name.endswith(("wo.weight", "w2.weight")) else shape[-1] ** -0.5
        weights[name] = torch.randn(shape, generator=generator) * scale if len(shape) == 2 else torch.ones(shape)
    # Every head starts with a preference for what is near, which would take most of the training to learn: all
    # embeddings share coordinate 0, which queries and keys read into rotary pairs of middle frequencies, where the
    # product of equal vectors falls with their distance.
    weights["tok_embeddings.weight"][:, 0] = 0.75
    for name, weight in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            weight.view(-1, config.head_dim // 2, 2, config.dim)[:, 3:10, 0, 0] = 1.2
    return weights


def demo_forward(
    weights: dict[str, torch.Tensor],
    config: LlamaConfig,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Llama 3 with gradients: tokens [B, T], mask [B, 1, T, T], to the last hidden rows [B, T, dim].

    As in Meta's checkpoints, rotary pairs are neighbours here.
    """
    turns = torch.complex(*(table[: tokens.shape[1]] for table in tables))  # [T, head_dim / 2]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(*tokens.shape, -1, config.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)

    group = config.n_heads // config.n_kv_heads
    x = weights["tok_embeddings.weight"][tokens]
    for i in range(config.n_layers):
        prefix = f"layers.{i}."
        w = {name[len(prefix) : -len(".weight")]: weights[name].t() for name in weights if name.startswith(prefix)}
        rows = rms_norm(x, w["attention_norm"], config.norm_eps)
        query, key, value = (heads(rows @ w[f"attention.{name}"]) for name in ("wq", "wk", "wv"))
        key, value = turned(key).repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        attended = F.scaled_dot_product_attention(turned(query), key, value, attn_mask=mask)
        x = x + attended.transpose(1, 2).flatten(2) @ w["attention.wo"]
        rows = rms_norm(x, w["ffn_norm"], config.norm_eps)
        x = x + (F.silu(rows @ w["feed_forward.w1"]) * (rows @ w["feed_forward.w3"])) @ w["feed_forward.w2"]
    return rms_norm(x, weights["norm.weight"], config.norm_eps)


# ======================================================================================================================
# Scheduler
# ======================================================================================================================


class TooLong(Exception):
    """The request can never fit the context; the message has both figures."""


class Unavailable(Exception):
    """The request is not taken now: loading, queue full, stopping, or the engine has failed for good."""


class EngineError(Exception):
    """The engine failed while it worked on the request."""


class LoadingStopped(Exception):
    """The scheduler was stopped while the engine was loading."""


class Generation:
    """One request below the text: what the handler's thread and the scheduler's thread share.

    The scheduler fills it, the handler reads `steps` and may call Scheduler.cancel. Times are time.monotonic()'s.
    """

    def __init__(
        self, prompt: list[int], max_tokens: int, sampling: SamplingParams, stop_tokens: frozenset[int]
    ) -> None:
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.stop_tokens = stop_tokens
        self.submitted = time.monotonic()
        self.admitted: float | None = None  # when it was given a slot
        self.first_token: float | None = None  # which may be the one that ends the answer
        self.last_token = 0.0
        self.count = 0  # tokens generated, the stop token aside
        self.cached = 0  # prompt tokens that the slot held already
        self.finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
        self.cancelled = ""  # the reason to finish it with, once it is given up
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: no more
        self._ended = threading.Event()

    def put(self, token: int) -> None:
        """The scheduler's side: one more token."""
        self.last_token = time.monotonic()
        self.count += 1
        self._tokens.put(token)

    def finish(self, reason: str) -> None:
        """The scheduler's side: no more tokens."""
        self.finish_reason = reason
        self._tokens.put(None)
        self._ended.set()

    def steps(self, eager: bool = True) -> Iterator[list[int]]:
        """The handler's side: the token ids as they come, all there are each time. Raises EngineError.

        One who is not eager gets them at the end; one who is, the first at once and the others a hundred times a second
        at most. To wake 32 threads for each token of a fast step would take a millisecond of the interpreter from the
        next.
        """
        pause = 0.0 if eager else None
        while True:
            self._ended.wait(pause)
            tokens = [self._tokens.get()]
            while not self._tokens.empty():
                tokens.append(self._tokens.get_nowait())
            if found := [token for token in tokens if token is not None]:
                yield found
                pause = 0.01
            if tokens[-1] is None:
                if self.finish_reason == "error":
                    raise EngineError("the engine failed on this request: the server's log says why; send it again")
                return


@dataclass
class Slot:
    """One place in the engine's batch. What it holds stays after an answer, for a request that starts the same way."""

    index: int
    generation: Generation | None = None
    tokens: list[int] = field(default_factory=list)  # prompt and answer
    held: int = 0  # how many of the tokens the engine has read
    used: float = 0.0  # when the last request left it

    @property
    def pending(self) -> int:
        """Tokens still to read: 1 while an answer is generated, more while a prompt is read."""
        return len(self.tokens) - self.held


class Pace:
    """How many prompt tokens a step may read while others wait for their next token.

    They make the step longer by PATIENCE times what it takes without, at most; where more prompts wait than streams
    run, by so many times that as there are prompts for each stream. Learned from the steps themselves, as running means
    of the seconds of a step without prompt tokens and of what each prompt token adds.
    """

    CHUNK = 512  # prompt tokens that are read at once, at most: more are no faster, and take longer to give up
    LEAST = 8  # with them a step is never much longer
    PATIENCE = 1.2
    MOST_WAITING = 4.0  # for each stream, as far as that counts

    def __init__(self) -> None:
        self._decode: dict[int, float] = {}  # by the number of streams, those of one power of two together
        self._token: float | None = None

    def budget(self, streams: int, waiting: int) -> int:
        """Prompt tokens for the next step, of so many streams and so many whose prompts are not read yet."""
        if not streams:
            return self.CHUNK
        # As many tokens as take the time of the step: no fewer than the streams, for each of those costs as much.
        nearest = min(self._decode, key=lambda seen: abs(seen - streams.bit_length()), default=None)
        alike = self._decode[nearest] / self._token if nearest is not None and self._token else 0.0
        patience = self.PATIENCE * min(max(1.0, waiting / streams), self.MOST_WAITING)
        return min(self.CHUNK, max(self.LEAST, int(patience * max(streams, alike))))

    def observe(self, seconds: float, streams: int, prompt_tokens: int) -> None:
        """Learn from a step."""
        kind = streams.bit_length()
        decode = self._decode.get(kind)
        if not prompt_tokens:
            self._decode[kind] = seconds if decode is None else 0.8 * decode + 0.2 * seconds
        elif streams and decode is not None:
            cost = max((seconds - decode) / prompt_tokens, decode / self.CHUNK)
            self._token = cost if self._token is None else 0.8 * self._token + 0.2 * cost
        elif self._token is None:
            self._token = seconds / prompt_tokens  # too much, for a step without prompt tokens takes its time too


class Histogram:
    """Durations in seconds, counted by upper bounds as Prometheus has them."""

    BOUNDS = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2.5, 5))  # 1 ms to 500 s

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)  # the last: of those longer than all bounds
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.total += seconds


class Statistics:
    """What has been since the start. Of the requests accepted each finishes once, so that the figures add up."""

    def __init__(self) -> None:
        self.accepted = 0
        self.finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.queue_time, self.first_token, self.per_token, self.duration = (Histogram() for _ in range(4))

    def finish(self, generation: Generation) -> None:
        """A request has finished, for whatever reason."""
        self.finished[generation.finish_reason or "error"] += 1
        self.generated_tokens += generation.count
        self.duration.observe(time.monotonic() - generation.submitted)
        if generation.admitted is not None:
            self.queue_time.observe(generation.admitted - generation.submitted)
        if generation.first_token is not None:
            self.prompt_tokens += len(generation.prompt)
            self.cached_tokens += generation.cached
            self.first_token.observe(generation.first_token - generation.submitted)
            if generation.count > 1:
                self.per_token.observe((generation.last_token - generation.first_token) / (generation.count - 1))


class Scheduler:
    """Continuous batching: one thread that loads the engine, runs it, and closes it.

    Between two steps requests leave and join. First come, first served. A step reads one token of every answer under
    way, and of the prompts so much as keeps the step short.
    """

    FAILURES = 3  # failed steps in a row after which the engine is given up
    STALL_SECONDS = 120.0  # that a step may take before the device is taken to hang

    def __init__(
        self,
        load: Callable[[Progress], Engine],
        max_queue: int,
        progress: Progress,
        notify: Callable[[str], None] = lambda event: None,
    ) -> None:
        self._state = "loading"
        self._error = ""
        self.failure: UserError | None = None  # why loading failed, if the user can help: for the command line to show
        self.doing: tuple[str, float | None] = ("starting", None)
        self.max_queue = max_queue
        self.max_seq_len = self.slot_share = 0  # tokens that a slot can hold, and that all slots can hold at once
        self.device = ""
        self._load = load
        self._progress = progress
        self._notify = notify  # called with "ready" when the engine is loaded, and with "ended" when the thread ends
        self._slots: list[Slot] = []
        self._queue: deque[Generation] = deque()
        # Guards the state, the queue and the statistics; what is in the slots changes in the scheduler's thread only.
        self._wake = threading.Condition()
        self._failures = 0
        self._step_began: float | None = None
        self.statistics = Statistics()
        self.ended = False

    def start(self) -> None:
        """Start to load."""
        threading.Thread(target=self._run, name="scheduler", daemon=True).start()

    # What the handlers' threads call:

    @property
    def state(self) -> str:
        """One of "loading", "healthy", "unhealthy" and "stopping"."""
        return "unhealthy" if self._state == "healthy" and self.error else self._state

    @property
    def error(self) -> str:
        """Why it is unhealthy: the engine has failed for good, or does not come back from a step."""
        began = self._step_began
        seconds = time.monotonic() - began if began else 0.0
        return f"a step has not returned for {seconds:.0f} seconds" if seconds > self.STALL_SECONDS else self._error

    def submit(self, generation: Generation) -> None:
        """Queue a request. Raises Unavailable where it cannot be taken now, TooLong where it never fits."""
        with self._wake:
            self.check_available()
            wanted = len(generation.prompt) + generation.max_tokens
            if wanted > self.max_seq_len:
                raise TooLong(
                    f"the prompt has {len(generation.prompt)} tokens and max_tokens is {generation.max_tokens}: "
                    f"together {wanted}, and the context holds {self.max_seq_len}: shorten it or lower max_tokens"
                )
            free = len(self._slots) - self.slots()["busy"]  # so many in front of the queue get a slot at once
            if len(self._queue) >= self.max_queue + free:
                raise Unavailable(f"the queue is full ({self.max_queue} requests wait): try again in a moment")
            self.statistics.accepted += 1
            self._queue.append(generation)
            self._wake.notify()

    def check_available(self) -> None:
        """Raise Unavailable unless requests are taken."""
        reasons = {
            "loading": "the model is still loading: GET /health shows how far it is",
            "unhealthy": f"the engine has failed and the server must be started again: {self.error}",
            "stopping": "the server is stopping",
        }
        if (state := self.state) != "healthy":  # looked at once: it may be another a moment later
            raise Unavailable(reasons[state])

    def cancel(self, generation: Generation, reason: str = "cancelled") -> None:
        """End the request, wherever it is; its slot is free before the next step. "stop": its text is complete."""
        with self._wake:
            generation.cancelled = reason
            if generation in self._queue:
                self._queue.remove(generation)
                self._finish(generation, reason)
            self._wake.notify()

    def stop(self, drain: bool) -> None:
        """Take no more requests and end: with `drain` after those in flight, else after the step under way."""
        with self._wake:
            if self._state in ("loading", "healthy"):
                self._state = "stopping"
            if not drain:
                for generation in filter(None, [*self._queue, *(slot.generation for slot in self._slots)]):
                    self.cancel(generation)
            self._wake.notify()

    def slots(self) -> dict[str, int]:
        """How many slots there are, and how many are busy."""
        return {"total": len(self._slots), "busy": sum(slot.generation is not None for slot in self._slots)}

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def kv_cache_use(self) -> float:
        """The part of the KV cache that is reserved for the requests in slots, 0 to 1."""
        generations = [slot.generation for slot in self._slots]
        reserved = sum(len(generation.prompt) + generation.max_tokens for generation in generations if generation)
        return reserved / self._engine.kv_cache_tokens if reserved else 0.0

    def _finish(self, generation: Generation, reason: str) -> None:
        generation.finish(reason)
        with self._wake:
            self.statistics.finish(generation)

    # The scheduler's own thread:

    def _report(self, doing: str, done: float | None = None) -> None:
        if self._state == "stopping":
            raise LoadingStopped
        self.doing = (doing, done)
        self._progress(doing, done)

    def _run(self) -> None:
        try:
            with contextlib.closing(self._load(self._report)) as engine:
                self._engine = engine
                with self._wake:
                    self._slots = [Slot(index) for index in range(engine.max_batch_size)]
                    self.max_seq_len, self.device = engine.max_seq_len, engine.device
                    self.slot_share = engine.kv_cache_tokens // engine.max_batch_size
                    if self._state == "loading":
                        self._state = "healthy"
                self._progress("ready", 1.0)
                self._notify("ready")
                self._serve()
        except LoadingStopped:
            pass
        except BaseException as error:
            if isinstance(error, UserError):
                self.failure = error
            else:
                logger.error("the engine has failed", exc_info=error)
            self._give_up(f"the engine failed with {type(error).__name__}: the log says why")
        finally:
            self.ended = True
            self._notify("ended")

    def _serve(self) -> None:
        pace = Pace()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._state != "healthy" or self.slots()["busy"])
                self._drop_cancelled()
                self._admit()
                if self._state != "healthy" and not self._queue and not self.slots()["busy"]:
                    return
            batch = self._plan(pace)
            if not batch:
                continue
            self._step_began = began = time.monotonic()
            try:
                tokens = self._engine.step(batch)
            except Exception as error:
                self._step_failed(batch, error)
                continue
            finally:
                self._step_began = None
            streams = sum(len(work.tokens) == 1 for work in batch)
            pace.observe(time.monotonic() - began, streams, sum(len(work.tokens) for work in batch) - streams)
            self._deliver(batch, tokens)

    def _drop_cancelled(self) -> None:
        for slot in self._slots:
            if slot.generation and slot.generation.cancelled:
                self._leave(slot, slot.generation.cancelled)

    def _admit(self) -> None:
        """Give free slots to those who wait longest, while there is room."""
        while self._queue and (free := [slot for slot in self._slots if slot.generation is None]):
            generation = self._queue[0]
            length = len(generation.prompt) + generation.max_tokens
            # The slot that holds most of the prompt already; else an empty one; else the one left longest ago. Where
            # the engine has several pools of memory, the next best may have room when the best has not.
            free.sort(key=lambda slot: (-self._common(slot, generation), bool(slot.held), slot.used, slot.index))
            slot = next((slot for slot in free if self._engine.reserve(slot.index, length)), None)
            if slot is None and len(free) < len(self._slots):
                return  # until one of those at work is done
            self._queue.popleft()
            if slot is None:
                self._finish(generation, "error")
                logger.error("the engine has no room for %d tokens though it is idle", length)
                continue
            generation.admitted = time.monotonic()
            slot.held = generation.cached = self._common(slot, generation)
            slot.generation, slot.tokens = generation, list(generation.prompt)

    @staticmethod
    def _common(slot: Slot, generation: Generation) -> int:
        """How many tokens of the prompt the slot can serve with; at least one is left to read, for the logits.

        0 where less than half of what it holds would be of use: it is better kept for the chat that it belongs to.
        """
        most = min(slot.held, len(generation.prompt) - 1)
        pairs = zip(slot.tokens[:most], generation.prompt)
        common = next((i for i, (held, wanted) in enumerate(pairs) if held != wanted), most)
        return common if 2 * common > slot.held else 0

    def _plan(self, pace: Pace) -> list[Work]:
        """The next step: every answer's last token, then prompts, the one that came first first, within the budget."""
        busy = [(slot, slot.generation) for slot in self._slots if slot.generation]
        answers = [(slot, generation) for slot, generation in busy if slot.pending == 1]
        prompts = [(slot, generation) for slot, generation in busy if slot.pending > 1]
        budget = pace.budget(len(answers), len(prompts))
        batch = [Work(slot.index, slot.tokens[-1:], slot.held, generation.sampling) for slot, generation in answers]
        for slot, generation in sorted(prompts, key=lambda prompt: prompt[1].submitted):
            if budget <= 0:
                break
            count = min(slot.pending, budget) if self._engine.splits_prompts else slot.pending
            budget -= count
            tokens = slot.tokens[slot.held : slot.held + count]
            batch.append(Work(slot.index, tokens, slot.held, generation.sampling if count == slot.pending else None))
        return batch

    def _deliver(self, batch: list[Work], tokens: list[int]) -> None:
        for work, token in zip(batch, tokens):
            slot = self._slots[work.slot]
            slot.held += len(work.tokens)
            generation = slot.generation
            if work.sampling is None or generation is None:
                continue
            generation.first_token = generation.first_token or time.monotonic()
            if token in generation.stop_tokens:
                self._leave(slot, "stop")
                continue
            slot.tokens.append(token)
            generation.put(token)
            if generation.count >= generation.max_tokens:
                self._leave(slot, "length")

    def _leave(self, slot: Slot, reason: str) -> None:
        assert slot.generation is not None
        if reason in ("stop", "length"):  # not a step alone: a card may fail at every decode, and never at a prefill
            self._failures = 0
        self._finish(slot.generation, reason)
        slot.generation, slot.used = None, time.monotonic()
        if self._engine.splits_prompts and reason != "error":
            del slot.tokens[slot.held :]
        else:  # nothing that it holds is of use, or is to be trusted
            self._engine.reserve(slot.index, 0)
            slot.tokens, slot.held = [], 0

    def _step_failed(self, batch: list[Work], error: Exception) -> None:
        """The requests of the step fail; the others go on."""
        logger.error("the engine failed on a step of %d requests", len(batch), exc_info=error)
        for work in batch:
            self._leave(self._slots[work.slot], "error")
        self._failures += 1
        if self._failures >= self.FAILURES:
            self._give_up(f"{self._failures} steps in a row failed, the last with {type(error).__name__}")

    def _give_up(self, error: str) -> None:
        with self._wake:
            self._error = self._error or error
            if self._state != "stopping":
                self._state = "unhealthy"
            for generation in [*self._queue, *(slot.generation for slot in self._slots)]:
                if generation:
                    self._finish(generation, "error")
            self._queue.clear()
            for slot in self._slots:  # without a word to the engine, which may be closed
                slot.generation = None


# ======================================================================================================================
# Dialects
# ======================================================================================================================

MAX_MESSAGES = 32768  # of a conversation: more than the longest context holds


class ApiError(Exception):
    """An answer that is not 200: the status, one plain sentence for the caller, the field that it is about.

    code: OpenAI's word for it, where it has one that clients look for.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


class ClientGone(Exception):
    """The client has closed the connection."""


class Fields:
    """A JSON object from a client, read field by field; each check names the field and what is allowed.

    null is the same as absent. The names that were asked for are remembered, so that others can be refused.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body
        self._known: list[str] = []

    def get(self, name: str) -> Any:
        """The field as it came, None if it is absent."""
        self._known.append(name)
        return self._body.get(name)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from low to high."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}, not {shown(value)}", name)
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number from low to high."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a whole number from {low} to {high}, not {shown(value)}", name)
        return value

    def flag(self, name: str) -> bool:
        """true or false; absent is false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false, not {shown(value)}", name)
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.get(name)
        return None if value is None else clean_text(value, name)

    def stop(self) -> list[str]:
        """`stop`: a string, or up to four."""
        value = self.get("stop")
        strings = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(strings, list) or len(strings) > 4 or not all(isinstance(s, str) and s for s in strings):
            raise ApiError(400, "stop must be a string or a list of up to four strings, none of them empty", "stop")
        return [clean_text(string, "stop") for string in strings]

    def messages(self) -> list[tuple[str, str]]:
        """`messages`: a list of {"role", "content"}, as (role, text); a content is a string or a list of text parts."""
        value = self.get("messages")
        if value is None:
            return []
        if not isinstance(value, list) or not value:
            raise ApiError(400, 'messages must be a list of at least one {"role": ..., "content": ...}', "messages")
        if len(value) > MAX_MESSAGES:
            raise ApiError(400, f"messages has {len(value)} entries, and {MAX_MESSAGES} are taken", "messages")
        messages = []
        for i, message in enumerate(value):
            where = f"messages[{i}]"
            if not isinstance(message, dict):
                must = f'{where} must be an object, {{"role": ..., "content": ...}}, not {shown(message)}'
                raise ApiError(400, must, where)
            role = message.get("role")
            if not isinstance(role, str) or role not in ROLES:
                must = f"{where}.role must be one of {', '.join(ROLES)}, not {shown_or_missing(role)}"
                raise ApiError(400, must, f"{where}.role")
            content = message.get("content")
            if isinstance(content, list):
                for part in content:
                    if not isinstance(part, dict) or part.get("type") != "text":
                        kind = shown(part.get("type") if isinstance(part, dict) else part)
                        must = (
                            f'{where}.content has a part {kind}, and only {{"type": "text", "text": ...}} is read here'
                        )
                        raise ApiError(400, must, f"{where}.content")
                content = "".join(clean_text(part.get("text"), f"{where}.content") for part in content)
            messages.append((ROLES[role], clean_text(content, f"{where}.content")))
        return messages

    def refuse_unknown(self) -> None:
        """Raise ApiError for a name that was never asked for, with the nearest that was."""
        for name in self._body:
            if name not in self._known:
                near = [known for known in self._known if name and known.startswith(name)]
                near = near or difflib.get_close_matches(name[:40], self._known, 1)
                hint = f": did you mean {near[0]}?" if near else f": the fields are {', '.join(self._known)}"
                raise ApiError(400, f"unknown field {shown(name)}{hint}", name[:100])


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def printable(text: str) -> str:
    """A client's text as a log or an error may show it: no control characters, no escapes, and short."""
    return "".join(c if c.isprintable() else "?" for c in text[:100])


def shown(value: Any) -> str:
    """A client's value as an error shows it: as JSON, printable and short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:  # which the decoder, on a shorter stack, was spared
        text = "something nested deeply"
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def shown_or_missing(value: Any) -> str:
    """The same of a field's value, where null is as good as absent."""
    return "missing" if value is None else shown(value)


def clean_text(value: Any, name: str) -> str:
    """`value`, which must be a string; lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD."""
    if not isinstance(value, str):
        raise ApiError(400, f"{name} must be a string, not {shown_or_missing(value)}", name)
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


@dataclass
class TextRequest:
    """What the dialects make of a body."""

    prompt: list[int]  # token ids
    max_tokens: int | None  # None: the dialect's default, or so many as the context holds
    sampling: SamplingParams
    stop: list[str]
    stream: bool
    ignore_eos: bool = False  # go on past the end of the turn, up to max_tokens: for benchmarks


def read_sampling(fields: Fields, temperature: float, top_p: float) -> SamplingParams:
    """The sampling fields, which all dialects share; the two arguments are the dialect's defaults."""
    return SamplingParams(
        temperature=fields.number("temperature", temperature, 0, 2),
        top_p=fields.number("top_p", top_p, 0, 1),
        top_k=max(0, fields.integer("top_k", 0, -1, VOCAB_SIZE) or 0),  # -1 is vLLM's 0
        seed=fields.integer("seed", None, -(2**63), 2**64 - 1),
    )


class Answer:
    """A request under way, on the handler's side: its text as it comes, and at the end its figures."""

    def __init__(self, request: TextRequest, generation: Generation, tokenizer: ChatTokenizer) -> None:
        self.request = request
        self.generation = generation
        self.text = ""
        self.finish_reason = ""
        self.count = 0  # tokens
        self.seconds = 0.0  # from submission to the last of them
        self.client_gone = False  # which ApiServer finds out
        self._stream = TextStream(tokenizer, request.stop)

    def pieces(self) -> Iterator[str]:
        """The answer's text, piece by piece, none of them empty. Raises EngineError, ClientGone and ApiError."""
        eager = self.request.stream or bool(self.request.stop)  # a stop string is to end the generation soon
        for tokens in itertools.chain(self.generation.steps(eager), [None]):
            piece = self._stream.push([], final=True) if tokens is None else ""
            for token in tokens or []:  # one by one, so that a stop string ends the count at its own last token
                piece += self._stream.push([token])
                self.count += 1
                if self._stream.stopped:
                    break
            self.text += piece
            self.seconds = time.monotonic() - self.generation.submitted
            if piece:
                yield piece
            if self._stream.stopped:
                break
        if self.client_gone:
            raise ClientGone
        if self.generation.finish_reason == "cancelled":
            raise ApiError(503, "the server stopped before the answer was complete: send the request again")
        self.finish_reason = "stop" if self._stream.stopped else self.generation.finish_reason or ""

    def figures(self) -> dict[str, Any]:
        """The figures, as /chat gives them."""
        first_token = self.generation.first_token or time.monotonic()
        return {
            "tokens_generated": self.count,
            "time_seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.count / max(self.seconds, 1e-9), 1),
            "prompt_tokens": len(self.generation.prompt),
            "time_to_first_token_seconds": round(first_token - self.generation.submitted, 3),
            "finish_reason": self.finish_reason,
        }


class Served(Protocol):
    """What the dialects need to know of the server."""

    model: str
    tokenizer: ChatTokenizer
    scheduler: Scheduler


class Dialect:
    """How a kind of client says what it wants and is answered: this one at POST /chat, with JSON or with lines of it.

    One is made for each request.
    """

    content_type = "application/x-ndjson"  # of a stream
    default_max_tokens: int | None = 128  # None: so many as the context holds
    example = '{"prompt": "Hello!"}'  # of a body

    def __init__(self, server: Served) -> None:
        self.server = server
        self._prompt = ""

    def read(self, fields: Fields) -> TextRequest:
        """Check the body. Raises ApiError."""
        prompt, system, stop = fields.text("prompt"), fields.text("system"), fields.stop()
        stream = fields.flag("stream")
        max_tokens = fields.integer("max_tokens", None, 1, 2**31)
        sampling = read_sampling(fields, temperature=0.7, top_p=0.9)
        messages = fields.messages()
        fields.refuse_unknown()
        if bool(messages) == (prompt is not None):
            raise ApiError(400, 'give either "prompt", a string, or "messages", a list: {"prompt": "Hello!"}')
        if prompt == "":
            raise ApiError(400, "prompt is empty: give it some text")
        messages = messages or [("user", prompt or "")]
        self._prompt = messages[-1][1]
        if system is not None:
            messages = [("system", system), *messages]
        return TextRequest(self.encode_chat(messages), max_tokens, sampling, stop, stream)

    def encode_chat(self, messages: list[tuple[str, str]]) -> list[int]:
        """The token ids of a conversation of (role, text)."""
        self.check_length(sum(len(text) for _, text in messages))
        return self.server.tokenizer.encode_chat(messages)

    def check_length(self, characters: int) -> None:
        """Refuse at once what is certainly too long: a token stands for 128 characters at most. Raises TooLong."""
        context = self.server.scheduler.max_seq_len
        if characters > 128 * context:
            raise TooLong(
                f"the prompt has {characters} characters, more than the {context} tokens of the context can stand for: "
                "shorten it"
            )

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of a plain answer."""
        return {"success": True, "prompt": self._prompt, "response": answer.text, **answer.figures()}

    def piece(self, text: str) -> bytes:
        """A piece of a streamed answer."""
        return self.line({"response": text})

    def end(self, answer: Answer) -> bytes:
        """What closes a streamed answer."""
        return self.line({"done": True, **self.whole(answer)})

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body of an error."""
        return {"error": str(error)}

    def line(self, value: dict[str, Any]) -> bytes:
        """`value` as a piece of a stream, which may be an error's body."""
        return json_line(value)


NOT_SAMPLED: dict[str, list[Any]] = {  # what the sampler does not do, in OpenAI's words, vLLM's and llama.cpp's
    "n": [1], "logit_bias": [{}], "presence_penalty": [0], "frequency_penalty": [0], "repetition_penalty": [1],
    "repeat_penalty": [1], "min_p": [0],
}  # fmt: skip


class ChatCompletions(Dialect):
    """POST /v1/chat/completions: OpenAI's JSON, or server-sent events as it comes.

    Source: https://platform.openai.com/docs/api-reference/chat/create, and what its clients send and expect.
    """

    content_type = "text/event-stream"
    default_max_tokens: int | None = None
    example = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"
    # Fields that would change the answer and are not served, with the values that ask for nothing: others are refused.
    UNSUPPORTED: ClassVar[dict[str, list[Any]]] = {
        **NOT_SAMPLED, "logprobs": [False], "top_logprobs": [0],
        "tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]], "function_call": ["none", "auto"],
        "response_format": [{"type": "text"}], "modalities": [["text"]], "audio": [], "prediction": [],
        "reasoning_effort": ["none"], "verbosity": ["medium"], "web_search_options": [],
    }  # fmt: skip
    # Fields that cannot change the answer.
    IGNORED: ClassVar[tuple[str, ...]] = (
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention",
    )  # fmt: skip

    def __init__(self, server: Served) -> None:
        super().__init__(server)
        self._include_usage = False
        self._role: dict[str, str] = {"role": "assistant"}  # said in a stream's first piece
        self._envelope = {
            "id": f"{self.id_prefix}{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": server.model,
            "system_fingerprint": f"fp_{__version__}_{server.scheduler.device}",
        }

    def read(self, fields: Fields) -> TextRequest:
        messages = fields.messages()
        max_tokens = fields.integer("max_tokens", None, 1, 2**31)
        max_tokens = fields.integer("max_completion_tokens", max_tokens, 1, 2**31)
        if not messages:
            raise ApiError(400, 'messages is missing: a list of {"role": ..., "content": ...}', "messages")
        request = self._read_common(fields, max_tokens)
        request.prompt = self.encode_chat(messages)
        return request

    def _read_common(self, fields: Fields, max_tokens: int | None) -> TextRequest:
        """All but the prompt."""
        model = fields.text("model")
        if model is not None and model != self.server.model:
            raise model_not_found(model, self.server.model)
        for name, harmless in self.UNSUPPORTED.items():
            value = fields.get(name)
            if value is not None and value not in harmless:
                raise ApiError(400, f"{name} is not supported here: leave it out", name, "unsupported_parameter")
        for name in self.IGNORED:
            fields.get(name)
        stream, options = fields.flag("stream"), fields.get("stream_options")
        if options is not None and not (stream and isinstance(options, dict)):
            raise ApiError(400, "stream_options must be an object, and goes with stream: true", "stream_options")
        self._include_usage = Fields(options or {}).flag("include_usage")
        sampling, stop = read_sampling(fields, temperature=1.0, top_p=1.0), fields.stop()
        ignore_eos = fields.flag("ignore_eos")
        fields.refuse_unknown()
        return TextRequest([], max_tokens, sampling, stop, stream, ignore_eos)

    def whole(self, answer: Answer) -> dict[str, Any]:
        choice = {**self._content(answer.text), "logprobs": None, "finish_reason": answer.finish_reason}
        return {**self._envelope, "choices": [{"index": 0, **choice}], "usage": self._usage(answer)}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        role, self._role = self._role, {}
        return {"delta": {**role, "content": text} if text or role else {}}

    def piece(self, text: str, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, **self._delta(text), "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return self.line({**self._envelope, "object": self.chunk_kind, "choices": [choice], **usage})

    def _usage(self, answer: Answer) -> dict[str, Any]:
        prompt, cached = len(answer.generation.prompt), answer.generation.cached
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer.count,
            "total_tokens": prompt + answer.count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def end(self, answer: Answer) -> bytes:
        usage = {**self._envelope, "object": self.chunk_kind, "choices": [], "usage": self._usage(answer)}
        last = self.line(usage) if self._include_usage else b""
        return self.piece("", answer.finish_reason) + last + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> dict[str, Any]:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}

    def line(self, value: dict[str, Any]) -> bytes:
        return b"data: " + json_line(value) + b"\n"


class Completions(ChatCompletions):
    """POST /v1/completions: the same for plain text, which the model goes on with. No chat format is put around it."""

    default_max_tokens = 16
    example = Dialect.example
    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"
    UNSUPPORTED: ClassVar[dict[str, list[Any]]] = {
        **NOT_SAMPLED, "logprobs": [], "best_of": [1], "echo": [False], "suffix": [""],
    }  # fmt: skip
    IGNORED: ClassVar[tuple[str, ...]] = ("user",)

    def read(self, fields: Fields) -> TextRequest:
        prompt = fields.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        listed = isinstance(prompt, list) and all(type(token) is int and 0 <= token < VOCAB_SIZE for token in prompt)
        if not prompt or not (listed or isinstance(prompt, str)):
            raise ApiError(400, "prompt must be one string, not empty, or one list of token ids", "prompt")
        request = self._read_common(fields, fields.integer("max_tokens", None, 1, 2**31))
        self.check_length(0 if listed else len(prompt))
        request.prompt = prompt if listed else self.server.tokenizer.encode_document(clean_text(prompt, "prompt"))
        return request

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content


def model_not_found(model: str, served: str) -> ApiError:
    """The error for a model that is not the one served."""
    message = f"there is no model {shown(model)} here: this server has {served}, and takes requests without a model too"
    return ApiError(404, message, "model", "model_not_found")


def json_line(value: dict[str, Any]) -> bytes:
    """`value` as one line of JSON in UTF-8."""
    return ENCODER.encode(value).encode(errors="replace") + b"\n"  # a field's name may hold half a character


ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one each time


# ======================================================================================================================
# Page
# ======================================================================================================================

# The chat page. What people and models write goes into it as text nodes alone, never as markup; and if ever it did not,
# the browser runs no script and applies no style but these two, which the policy below names by their hashes.
PAGE = r"""<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chat</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --soft: light-dark(#5b616c, #a6acb8); --tint: light-dark(#eef0f7, #272b37);
  --accent: light-dark(#3a55b8, #a9bcff); --alert: light-dark(#b3261e, #ff9d94); font: 1rem/1.6 system-ui, sans-serif; }
* { box-sizing: border-box; margin: 0; font: inherit; overflow-wrap: anywhere; outline-color: var(--accent); }
body { display: flex; flex-direction: column; max-width: 46rem; min-height: 100dvh; margin: auto; padding: 0 1rem; }
button, input, textarea { padding: .5rem .75rem; border: 1px solid GrayText; border-radius: .6rem; background: Canvas; }
small, label, ::placeholder { color: var(--soft); font-size: .875rem; font-weight: 400; }

header, footer { position: sticky; inset: 0; display: flex; flex-wrap: wrap; align-items: end; gap: .5rem;
  padding: 1rem 0; background: Canvas; }
header div { flex: 1; line-height: 1.3; font-weight: 600; }
#settings { margin: 5.5rem max(1rem, 50% - 22rem) 0 auto; padding: 1rem; border: 1px solid GrayText;
  border-radius: 1rem; box-shadow: 0 .5rem 2rem #0004; }
label > * { display: block; width: 18rem; margin: .25rem 0 .75rem; color: CanvasText; font-size: 1rem; }

main { flex: 1; padding: 1rem 0; }
main:empty { flex: .4; }  /* before the first question the input is in the middle */
article { display: grid; gap: .75rem; margin-bottom: 2.5rem; white-space: pre-wrap; }
.user { justify-self: end; padding: .6rem 1rem; border-radius: 1.2rem; background: var(--tint); }
[aria-busy=true] :last-child > .assistant::after { content: "▍"; color: var(--accent); }  /* there is more to come */
.failed small, .gone, .stopping, .unhealthy { color: var(--alert); }

progress, footer small { width: 100%; accent-color: var(--accent); }
#input { flex: 1; min-width: 0; max-height: 40vh; resize: none; field-sizing: content; }
#send:enabled { border-color: var(--accent); background: var(--accent); color: Canvas; }
</style>
<header>
  <div><h1 id="model">Chat</h1><small id="status" role="status">connecting</small></div>
  <button id="new">New chat</button>
  <button popovertarget="settings">Settings</button>
</header>
<section id="settings" popover>
  <label>System prompt <textarea id="system" rows="3"></textarea></label>
  <label>Temperature <input id="temperature" type="number" min="0" max="2" step="0.1" value="0.7"></label>
  <label>Max tokens <input id="max-tokens" type="number" min="1" value="512"></label>
</section>
<main aria-live="polite"></main>
<template><article><h2 class="user"></h2><div class="assistant"></div><small></small></article></template>
<footer>
  <progress id="bar" aria-label="Loading" hidden></progress>
  <textarea id="input" rows="2" placeholder="What would you like to know?" aria-label="Message" autofocus></textarea>
  <button id="send" disabled>Send</button>
  <small id="state"></small>
</footer>
<script>
const $ = (selector) => document.querySelector(selector)
const input = $("#input")
let health = {}  // what GET /health answered last
let request = null  // the AbortController of the answer under way
let atEnd = true  // whether the reader looks at the end of the conversation, which stays in view then

function render() {  // shows the health and what the button does; the conversation is up to ask()
  const {status, model, device, error, progress = {}} = health
  const summary = [status, device].filter(Boolean).join(" · ")
  if ($("#status").textContent !== summary) $("#status").textContent = summary  // each change is read out
  $("#model").textContent = document.title = model || "Chat"
  $("#bar").hidden = status !== "loading"
  $("#bar").value = progress.done || 0
  $("#state").className = status
  $("#state").textContent = {
    healthy: "Enter sends · Shift+Enter new line · Esc stops",
    loading: `Getting ready: ${progress.doing}, ${Math.round(progress.seconds)} s`,
    stopping: "The server is stopping: it completes the answers under way and takes no new questions",
    gone: "The server cannot be reached: this page looks for it every second",
  }[status] || `The server cannot answer: ${error}`
  $("#send").textContent = request ? "Stop" : "Send"
  $("#send").disabled = !request && status !== "healthy"
  $("main").ariaBusy = Boolean(request)
}

async function poll() {
  const gone = () => ({...health, status: "gone"})
  health = await fetch("/health", {signal: AbortSignal.timeout(5000)}).then((reply) => reply.json()).catch(gone)
  render()
  setTimeout(poll, health.status === "healthy" ? 5000 : 1000)
}

async function ask() {
  const question = input.value
  if (health.status !== "healthy" || request || !question.trim()) return
  const turn = $("template").content.firstElementChild.cloneNode(true)
  const [user, assistant, note] = turn.children
  user.textContent = question
  $("main").append(turn)
  input.value = ""
  atEnd = true
  request = new AbortController()
  render()
  const last = await receive(assistant).catch(() => ({}))  // stopped, or the connection broke
  if (last.done) {
    note.textContent = `${last.tokens_per_second} tokens/s · first token after ${last.time_to_first_token_seconds} s`
    if (last.finish_reason === "length") note.prepend(`Cut off at the limit of ${last.tokens_generated} tokens · `)
  } else if (request.signal.aborted) {
    note.textContent = "Stopped"
  } else {  // the question goes back to where it was written
    turn.className = "failed"
    note.textContent = "Failed: " + (last.error || "the connection to the server broke")
    input.value = [question, input.value].filter(Boolean).join("\n")
  }
  request = null
  render()
}

async function receive(assistant) {  // shows the answer as it comes; returns the last line: the figures, or an error
  const shown = document.querySelectorAll("article:not(.failed) > :is(h2, div)")  // the last is the answer to come
  const messages = [...shown].slice(0, -1).map(({className, textContent}) => ({role: className, content: textContent}))
  const response = await fetch("/chat", {
    method: "POST", headers: {"Content-Type": "application/json"}, signal: request.signal,
    body: JSON.stringify({  // an empty number is NaN, which JSON spells null: the server's default
      messages, stream: true, system: $("#system").value || null,
      temperature: $("#temperature").valueAsNumber, max_tokens: $("#max-tokens").valueAsNumber,
    }),
  })
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = "", last = {}, chunk
  while (!(chunk = await reader.read()).done) {
    const lines = (rest + chunk.value).split("\n")
    rest = lines.pop()
    for (const line of lines) {
      last = JSON.parse(line)
      if (!last.done) assistant.append(last.response || "")
    }
  }
  return last
}

document.onkeydown = (event) => {
  if (event.isComposing || event.keyCode === 229) return  // an input method's; Safari has the code alone
  if (event.key === "Escape") request?.abort()
  if (event.key !== "Enter" || event.shiftKey || event.target !== input) return
  event.preventDefault()
  ask()
}
$("#send").onclick = () => request ? request.abort() : ask()
$("footer").onclick = () => input.focus()
$("#new").onclick = () => {
  request?.abort()
  $("main").replaceChildren()
  input.focus()
}
document.onscroll = () => { atEnd = scrollY + innerHeight > document.body.scrollHeight - 2 }
new ResizeObserver(() => { if (atEnd) scrollTo(0, document.body.scrollHeight) }).observe(document.body)
poll()
</script>
"""


def source_hash(tag: str) -> str:
    """How a Content-Security-Policy names what stands between <tag> and </tag> in PAGE."""
    source = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {source_hash('script')}; style-src {source_hash('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


# ======================================================================================================================
# HTTP
# ======================================================================================================================

MAX_BODY_BYTES, MAX_BODIES_BYTES = 8 << 20, 256 << 20  # of one request, and of all that are under way
MAX_HEADER_BYTES, MAX_HEADER_FIELDS = 65536, 100
REQUEST_SECONDS = 30.0  # that a client may take for a header, for a body, and for each write
IDLE_SECONDS = 60.0  # that a connection is kept without a request
LEAST_IDLE_SECONDS = 1.0  # that one is kept so even where all are in use
SPARE_CONNECTIONS = 256  # beside one for each request that can be answered or wait
# Connections beyond those are told that there is no room: so many at a time, and each has so long for it at least.
CROWD, CROWD_SECONDS = 32, 0.1
REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([!-~]+) (HTTP/1\.[01])")
HEADER_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")  # RFC 9110, 5.6.2 and 5.5
HOST = re.compile(r"([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")


class TimedReader(io.RawIOBase):
    """A socket's bytes until a deadline, of time.monotonic(): who sends one now and then gains no time by it.

    `waiting` makes a context that is entered while it waits; nothing is taken from the socket within it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self.deadline = math.inf
        self.waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """What has come, waiting for the first byte. Raises TimeoutError."""
        with self.waiting():
            if not self._poll.poll(max(0.0, 1000 * (self.deadline - time.monotonic()))):
                raise TimeoutError
        return self._connection.recv_into(buffer)


class ApiHandler(BaseHTTPRequestHandler):
    """One connection: reads requests, answers them, one after the other."""

    server: ApiServer
    crowded = False  # there is no room for this connection, which is told so
    idle_seconds, request_seconds = IDLE_SECONDS, REQUEST_SECONDS

    # Requests and routes

    def setup(self) -> None:
        """A connection is here. Instead of http.server's files it has a reader that knows of deadlines."""
        self.connection = self.request
        # Without this an answer's second packet is held back by Nagle's algorithm until the client's delayed
        # acknowledgement of the first: 40 ms for every request of a kept-alive connection.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = TimedReader(self.connection)
        self.buffer = io.BufferedReader(self.reader)
        self.body = bytearray()  # empty between two requests

    def handle_one_request(self) -> None:
        """Wait for a request, read it and answer it."""
        self.command, self.path, self.request_version, self.close_connection = "", "", "HTTP/1.1", True
        self.header: dict[str, str] = {}
        self.status, self.outcome, self.streaming, self.unread = 0, "", False, False
        self.dialect = Dialect(self.server)
        try:
            self.reader.deadline = time.monotonic() + self.idle_seconds
            self.reader.waiting = functools.partial(self.server.idle, self)
            while (begun := self.buffer.peek(1)[:1]) in (b"\r", b"\n"):  # empty lines do not count: RFC 9112, 2.2
                self.buffer.read(1)
            if not begun:
                return
            self.reader.waiting = contextlib.nullcontext
            with self._in_time("header"):
                self._read_header()
            self._route()
        except ApiError as error:
            self._send_error(error)
        except Unavailable as error:
            self._send_error(ApiError(503, str(error)))
        except TooLong as error:
            self._send_error(ApiError(400, str(error), "max_tokens", "context_length_exceeded"))
        except EngineError as error:
            self._send_error(ApiError(500, str(error)))
        except (ClientGone, OSError):
            self.outcome += " client gone"
            self.close_connection = True
        except Exception:
            logger.exception("an error in the server while it answered %s", self._target())
            self._send_error(ApiError(500, "the server failed on this request: its log says why"))
        finally:
            self.server.give_room(len(self.body))
            self.body.clear()
        self._log()

    @contextlib.contextmanager
    def _in_time(self, what: str) -> Iterator[None]:
        """Read `what`, within request_seconds. Raises ApiError where it takes longer."""
        self.reader.deadline = time.monotonic() + self.request_seconds
        try:
            yield
        except TimeoutError as error:
            late = f"the {what} did not come within {self.request_seconds:.0f} seconds: send it again"
            raise ApiError(408, late) from error

    @property
    def endpoint(self) -> str:
        """The path without its query; empty before there is one."""
        return self.path.partition("?")[0]

    def _read_header(self) -> None:
        """Read the first line and the header: no header that a proxy in front might read otherwise.

        Names are lower case; a field that comes twice has both values, with a comma. http.server's own, which is more
        lenient, takes four times as long. Raises ApiError, and ClientGone where the header breaks off.
        """
        room, fields, first = MAX_HEADER_BYTES, 0, ""
        while (line := self.buffer.readline(room + 1)) not in (b"\r\n", b"\n"):
            if not line.endswith(b"\n") and len(line) <= room:
                raise ClientGone
            room -= len(line)
            if room < 0 or fields == MAX_HEADER_FIELDS:
                if not first:
                    raise ApiError(414, f"the first line, which has the path, has at most {MAX_HEADER_BYTES} bytes")
                raise ApiError(431, f"a header has at most {MAX_HEADER_FIELDS} fields and {MAX_HEADER_BYTES} bytes")
            text = line.decode("latin-1").removesuffix("\n").removesuffix("\r")
            if not first:
                first = text
            elif field := HEADER_FIELD.fullmatch(text):
                fields += 1
                name, value = field[1].lower(), field[2].strip(" \t")
                self.header[name] = f"{self.header[name]}, {value}" if name in self.header else value
            else:
                raise ApiError(400, "a line of the header is not NAME: VALUE")
        if not (match := REQUEST_LINE.fullmatch(first)):
            raise ApiError(400, "the first line must be METHOD PATH HTTP/1.1")
        self.command, self.path, self.request_version = match.groups()
        if absolute := re.match(r"https?://([^/?]*)", self.path):  # as to a proxy: RFC 9112, 3.2.2
            rest = self.path[absolute.end() :]
            self.header["host"], self.path = absolute[1], rest if rest.startswith("/") else f"/{rest}"
        connection = self.header.get("connection", "").lower()
        stays = "close" not in connection if self.request_version == "HTTP/1.1" else "keep-alive" in connection
        self.close_connection = self.crowded or not stays
        self.unread = self.header.get("content-length", "0") != "0" or "transfer-encoding" in self.header
        # The path alone decides in which dialect a request is answered, errors too.
        if self.path.startswith("/v1"):
            self.dialect = (Completions if self.endpoint == "/v1/completions" else ChatCompletions)(self.server)

    def _route(self) -> None:
        path = self.endpoint
        if self.crowded and path != "/health":
            raise ApiError(503, f"all {self.server.max_connections} connections are in use: try again in a moment")
        self._check_site()
        self._check_key(path)
        self._read_body()
        route = route_of(path)
        if route not in ROUTES:
            endpoints = ", ".join(f"{method} {known}" for known, (method, _) in ROUTES.items())
            raise ApiError(404, f"there is no {printable(path)} here: the endpoints are {endpoints}")
        method, answer = ROUTES[route]
        allowed = ["OPTIONS", "GET", "HEAD"] if method == "GET" else ["OPTIONS", method]
        if self.command == "OPTIONS":
            preflight = {
                "Allow": ", ".join(allowed),
                "Access-Control-Allow-Methods": method,
                "Access-Control-Allow-Headers": "Content-Type, Authorization, *",  # * does not stand for Authorization
                "Access-Control-Max-Age": "600",
            }
            self._send(204, b"", "", **preflight)
        elif self.command not in allowed:
            raise ApiError(405, f"{path} takes {method}, not {self.command}", Allow=", ".join(allowed))
        else:
            answer(self)

    def _read_body(self) -> None:
        """Read the request's body whole, whatever becomes of it, so that the connection can go on."""
        if "transfer-encoding" in self.header:
            raise ApiError(411, "chunked bodies are not read: send the body with a Content-Length")
        length = self.header.get("content-length", "0")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise ApiError(400, "Content-Length must be given once, and be a number")
        if int(length) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has {length} bytes, and at most {MAX_BODY_BYTES} are read")
        if self.header.get("expect", "").lower() == "100-continue" and self.request_version == "HTTP/1.1":
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        with self._in_time("body"):
            while len(self.body) < int(length):
                piece = self.buffer.read1(int(length) - len(self.body))
                if not piece:
                    raise ClientGone
                if not self.server.take_room(len(piece)):
                    raise ApiError(503, "the requests under way are too large together: try again in a moment")
                self.body += piece
        self.unread = False

    def _check_site(self) -> None:
        """Refuse pages of other sites, which a browser lets ask any server that its user can reach.

        While the server listens on this machine alone, and anyone may ask, the Host must be this machine too: another
        name that leads here is another site's (DNS rebinding).
        """
        host, origin = self.header.get("host"), self.header.get("origin")
        if not HOST.fullmatch(host or "") and (host is not None or self.request_version == "HTTP/1.1"):
            raise ApiError(400, "a request names its Host once, as NAME or NAME:PORT")
        if host and self.server.on_loopback and not self.server.api_key and not is_loopback(f"//{host}"):
            raise ApiError(
                403, f"the Host {printable(host)} is not this machine's: ask localhost, or give the server a key"
            )
        if origin and not self._allowed(origin):
            shown_origin = printable(origin)
            raise ApiError(
                403, f"pages of {shown_origin} may not use this server: --allow-origin {shown_origin} lets them"
            )

    def _allowed(self, origin: str) -> bool:
        """Whether pages of this origin may ask: this machine's, those named, and the server's own page.

        A page that came from the name it asks may be another site's all the same, whose name leads here by now: so by
        its own Origin it is known only if that is an address, or if it needs the key anyway.
        """
        server, host = self.server, self.header.get("host")
        own = origin.partition("://")[2] == host and (bool(server.api_key) or is_address(origin))
        return own or is_loopback(origin) or origin in server.allowed_origins or "*" in server.allowed_origins

    def _check_key(self, path: str) -> None:
        """Refuse who has not the key: as a Bearer token or, for browsers, which ask their user, as a Basic password."""
        key = self.server.api_key
        if key is None or path == "/health" or self.command == "OPTIONS":
            return
        kind, _, text = self.header.get("authorization", "").partition(" ")
        given = text.strip(" ").encode("latin-1")
        if kind.lower() == "basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given, validate=True).partition(b":")[2]
        if kind.lower() not in ("bearer", "basic") or not hmac.compare_digest(given, key.encode()):
            challenge = {"WWW-Authenticate": 'Basic realm="tt_api_server", charset="UTF-8"'}
            message = "the API key is missing or wrong: send it with -H 'Authorization: Bearer KEY'"
            raise ApiError(401, message, None, "invalid_api_key", **challenge)

    def page(self) -> None:
        """GET /."""
        self._send(200, PAGE.encode(), "text/html; charset=utf-8", **PAGE_HEADERS)

    def health(self) -> None:
        """GET /health."""
        status, report = self.server.health(is_loopback(f"//{self.header.get('host', '')}"))
        self._send(status, json_line(report), "application/json")

    def metrics(self) -> None:
        """GET /metrics."""
        self._send(200, metrics_text(self.server).encode(), "text/plain; version=0.0.4; charset=utf-8")

    def models(self) -> None:
        """GET /v1/models and /v1/models/NAME: the one that is served."""
        server = self.server
        server.scheduler.check_available()
        model = {"id": server.model, "object": "model", "created": server.created, "owned_by": "tt_api_server"}
        model["max_model_len"] = server.scheduler.max_seq_len  # vLLM's name for it
        name = urllib.parse.unquote(self.endpoint[len("/v1/models/") :])
        if name and name != server.model:
            raise model_not_found(name, server.model)
        self._send(200, json_line(model if name else {"object": "list", "data": [model]}), "application/json")

    def complete(self) -> None:
        """The one path of a request for text, in any dialect, streamed or not."""
        dialect = self.dialect
        answer = self._submit()
        streams = answer.request.stream
        self.server.watch(self.connection, answer)
        try:
            for piece in answer.pieces():
                if streams:
                    self._send_piece(dialect.piece(piece))
            if streams:
                self._send_piece(dialect.end(answer), last=True)
            else:
                self._send(200, json_line(dialect.whole(answer)), "application/json")
        finally:
            self.server.watch(self.connection, None)
            if answer.generation.finish_reason is None:
                self.server.scheduler.cancel(answer.generation, answer.finish_reason or "cancelled")
            figures = answer.figures()
            self.outcome = (
                f" prompt={figures['prompt_tokens']} generated={figures['tokens_generated']}"
                f" first={figures['time_to_first_token_seconds']:.3f}s {figures['tokens_per_second']:.1f} tokens/s"
            )

    def _submit(self) -> Answer:
        """Read the JSON, of which nothing stays, for it may take thirty times the body's memory; queue the request."""
        if "content-length" not in self.header:
            raise ApiError(
                411, f"the request has no body with a Content-Length: send JSON, as in {self.dialect.example}"
            )
        self.server.scheduler.check_available()
        # A few at a time, or the work of a crowd would keep /health and the streams under way waiting.
        with self.server.turns:
            if hung_up([self.connection]):
                raise ClientGone
            fields = self._json_object()
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("%s", json.dumps(fields)[:10_000])
            return self.server.submit(self.dialect.read(Fields(fields)), self.dialect.default_max_tokens)

    def _json_object(self) -> dict[str, Any]:
        media_type = self.header.get("content-type", "nothing").partition(";")[0].strip()
        if media_type.lower() != "application/json":
            raise ApiError(
                415, f"the body is {printable(media_type)}: send JSON, with -H 'Content-Type: application/json'"
            )
        if "content-encoding" in self.header:
            raise ApiError(415, "the body has a Content-Encoding: send it as it is, without compression")
        # json.loads holds all threads up while it makes something of each comma. A token has no more than 8 of them.
        commas, context = self.body.count(b","), self.server.scheduler.max_seq_len
        if commas > 16 * context:
            raise TooLong(f"the body has {commas} commas, more than the {context} tokens of the context: shorten it")
        example = f"send a JSON object, such as {self.dialect.example}"
        try:
            value = json.loads(self.body or b"null")
        except (ValueError, RecursionError) as error:
            reasons = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it is nested too deeply"}
            reason = reasons.get(type(error), str(error).partition(";")[0])
            raise ApiError(400, f"the body is not JSON ({reason}): {example}") from error
        if not isinstance(value, dict):
            raise ApiError(400, f"the body is {shown(value) if self.body else 'empty'}: {example}")
        return value

    # Answers

    def _send(self, status: int, body: bytes, content_type: str, **headers: str) -> None:
        """Send a whole answer."""
        framing = {} if status == 204 else {"Content-Length": str(len(body))}
        retry = {"Retry-After": "1"} if status == 503 else {}
        head = self._head(status, content_type, {**framing, **retry, **headers})
        self._write(head if self.command == "HEAD" else head + body)

    def _send_piece(self, data: bytes, last: bool = False) -> None:
        """Send a piece of a streamed answer. The header leaves with the first: a failure before it has a status."""
        chunked = self.request_version != "HTTP/1.0"
        head = b""
        if not self.streaming:
            self.streaming = True
            self.close_connection |= not chunked
            framing = {"Transfer-Encoding": "chunked"} if chunked else {}
            head = self._head(200, self.dialect.content_type, {**framing, "Cache-Control": "no-cache"})
        end = b"0\r\n\r\n" if last else b""
        self._write(head + (b"%x\r\n%b\r\n%b" % (len(data), data, end) if chunked else data))

    def _head(self, status: int, content_type: str, headers: dict[str, str]) -> bytes:
        self.status = status
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {self.date_time_string()}"]
        if content_type:
            lines.append(f"Content-Type: {content_type}")
        origin = self.header.get("origin")
        if origin and self._allowed(origin):
            lines += [f"Access-Control-Allow-Origin: {origin}", "Vary: Origin"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.close_connection |= self.unread  # what is left of the body would be taken for the next request
        if self.close_connection:
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _write(self, data: bytes) -> None:
        """Send these bytes. Raises TimeoutError where no more of them are taken for a while."""
        self.connection.settimeout(REQUEST_SECONDS)  # of each send, where sendall's is for the whole
        left = memoryview(data)
        while left:
            left = left[self.connection.send(left) :]

    def _send_error(self, error: ApiError) -> None:
        """Answer with an error; a stream that has begun ends with it."""
        logger.debug("%s: %s", self._target(), error)
        body = self.dialect.error(error)
        try:
            if self.streaming:
                self._send_piece(self.dialect.line(body), last=True)
            else:
                self._send(error.status, json_line(body), "application/json", **error.headers)
        except OSError:
            self.close_connection = True

    def finish(self) -> None:
        """Close so that the last answer arrives: a socket closed with unread input resets the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.2)
            deadline = time.monotonic() + 2
            while self.connection.recv(65536) and time.monotonic() < deadline:
                pass

    # The log

    def _target(self) -> str:
        return f"{printable(self.command or '-')} {printable(self.endpoint or '-')}"

    def _log(self) -> None:
        """One line for each request; never a prompt's text. Those that only ask how it is are for --verbose."""
        if not self.path and not self.status:  # the client went away before it had asked anything
            return
        if self.status:
            self.server.count(self.endpoint, self.status)
        asks = self.command in ("GET", "HEAD") and self.status in (200, 503)
        level = logging.DEBUG if asks else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "%s %s%s", self._target(), self.status or "-", self.outcome)


class CrowdedHandler(ApiHandler):
    """A connection beyond those that have room: /health is answered, all else is refused, and at once."""

    crowded = True
    idle_seconds = request_seconds = 2.0


ROUTES: dict[str, tuple[str, Callable[[ApiHandler], None]]] = {
    "/": ("GET", ApiHandler.page),
    "/health": ("GET", ApiHandler.health),
    "/metrics": ("GET", ApiHandler.metrics),
    "/chat": ("POST", ApiHandler.complete),
    "/v1/chat/completions": ("POST", ApiHandler.complete),
    "/v1/completions": ("POST", ApiHandler.complete),
    "/v1/models": ("GET", ApiHandler.models),
    "/v1/models/NAME": ("GET", ApiHandler.models),
}


def route_of(path: str) -> str:
    """The key of ROUTES that the path belongs to, if there is one; else the path."""
    return "/v1/models/NAME" if path.startswith("/v1/models/") else path


def metrics_text(server: ApiServer) -> str:
    """What /metrics says, in Prometheus's format. Names are vLLM's, with tt_ for vllm:, where the meaning is vLLM's."""
    scheduler, statistics = server.scheduler, server.scheduler.statistics
    lines: list[str] = []

    def add(name: str, kind: str, what: str, samples: Mapping[str, float]) -> None:  # by suffix and labels
        lines.extend((f"# HELP tt_{name} {what}", f"# TYPE tt_{name} {kind}"))
        lines.extend(f"tt_{name}{labels} {value}" for labels, value in samples.items())

    def label(text: str) -> str:
        return json.dumps(printable(text), ensure_ascii=False)

    slots = scheduler.slots()
    info = f'{{model={label(server.model)},device={label(scheduler.device)},version="{__version__}"}}'
    add("server_info", "gauge", "What is served, and on what.", {info: 1})
    add("num_requests_running", "gauge", "Requests in a slot.", {"": slots["busy"]})
    add("num_requests_waiting", "gauge", "Requests that wait for a slot.", {"": scheduler.queued})
    add("slots", "gauge", "Requests that can run together.", {"": slots["total"]})
    add("http_connections", "gauge", "Connections that are open.", {"": server.connections})
    add(
        "kv_cache_usage_perc", "gauge", "Part of the KV cache that is reserved, 1 is all.", {"": scheduler.kv_cache_use}
    )
    add("requests_accepted_total", "counter", "Requests that were queued.", {"": statistics.accepted})
    outcomes = {f'{{finished_reason="{reason}"}}': count for reason, count in statistics.finished.items()}
    add("requests_finished_total", "counter", "Requests that finished, by outcome.", outcomes)
    responses = {f'{{path="{p}",status="{status}"}}': count for (p, status), count in dict(server.responses).items()}
    add("http_responses_total", "counter", "Answers, by path and status.", responses)
    for name, what, count in (
        ("prompt_tokens_total", "Prompt tokens of finished requests.", statistics.prompt_tokens),
        ("generation_tokens_total", "Tokens generated for finished requests.", statistics.generated_tokens),
        ("prefix_cache_queries_total", "Prompt tokens looked up in the slots.", statistics.prompt_tokens),
        ("prefix_cache_hits_total", "Prompt tokens that a slot held already.", statistics.cached_tokens),
    ):
        add(name, "counter", what, {"": count})
    for name, what, histogram in (
        ("time_to_first_token_seconds", "From the request to its first token.", statistics.first_token),
        ("request_time_per_output_token_seconds", "Of a request, from its second token on.", statistics.per_token),
        ("e2e_request_latency_seconds", "From the request to its last token.", statistics.duration),
        ("request_queue_time_seconds", "From the request to a slot.", statistics.queue_time),
    ):
        counts = list(itertools.accumulate(histogram.counts))
        bounds = [*(f"{bound:g}" for bound in histogram.BOUNDS), "+Inf"]
        buckets = {f'_bucket{{le="{bound}"}}': count for bound, count in zip(bounds, counts)}
        add(name, "histogram", what, {**buckets, "_sum": histogram.total, "_count": counts[-1]})
    return "\n".join([*lines, ""])


@functools.lru_cache
def is_loopback(url: str) -> bool:
    """Whether a URL, or a host written as //host:port, leads to this machine by a name that only this machine has."""
    with contextlib.suppress(ValueError):
        host = urllib.parse.urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    return False


HANG_UP = getattr(select, "POLLRDHUP", 0)  # Linux tells that the other side has closed even behind unread input


def arrivals(connections: Iterable[socket.socket]) -> dict[socket.socket, int]:
    """The connections on which something has come in, with what it is as poll() says it."""
    poll, by_number = select.poll(), {connection.fileno(): connection for connection in connections}
    by_number.pop(-1, None)  # one that has just been closed
    for number in by_number:
        poll.register(number, select.POLLIN | HANG_UP)
    return {by_number[number]: event for number, event in poll.poll(0)}


def hung_up(connections: Iterable[socket.socket]) -> list[socket.socket]:
    """Those whose other side has closed, or its sending side at least. Never waits, whoever else reads from them."""
    events = arrivals(connections)
    if HANG_UP:
        return [
            connection for connection, event in events.items() if event & (HANG_UP | select.POLLHUP | select.POLLERR)
        ]
    gone = []
    for connection in events:
        with contextlib.suppress(OSError):
            if any(fcntl.ioctl(connection, termios.FIONREAD, bytes(4))):  # there is something to read, not the end
                continue
        gone.append(connection)
    return gone


def is_address(url: str) -> bool:
    """Whether the URL's host is an IP address, which no other site can have."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(urllib.parse.urlsplit(url).hostname or ""))
    return False


class ApiServer(HTTPServer):
    """The listening socket, and what its handlers share."""

    request_queue_size = 1024
    allow_reuse_port = False  # or two servers could share a port unawares: http.server's default from Python 3.14 on

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), ApiHandler)
        self.on_loopback = is_loopback(f"//[{host}]" if ":" in host else f"//{host}")
        self.scheduler: Scheduler
        self.tokenizer: ChatTokenizer
        self.model = ""  # the model's name, folder and what is worth saying of it; known early, shown by /health
        self.folder = ""
        self.note = "Model is loaded in memory for fast inference"
        self.created = int(time.time())
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status
        self.api_key: str | None = None
        self.allowed_origins: list[str] = []
        self.max_connections = 512
        self.turns = threading.Semaphore(2)  # to read a request's JSON and text
        self._started = time.monotonic()
        self._lock = threading.Condition()  # guards what follows
        self.connections = self._bodies = 0
        self._idle: dict[
            socket.socket, float
        ] = {}  # connections that wait for a request, the longest first, since when
        self._answers: dict[socket.socket, Answer] = {}  # those that wait for an answer
        self._looked = 0.0  # when it was last looked whether their clients are still there
        self._crowd: dict[socket.socket, float] = {}  # connections beyond max_connections, and since when

    def server_bind(self) -> None:
        """Bind without http.server's look-up of this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def submit(self, request: TextRequest, default_max_tokens: int | None) -> Answer:
        """Queue the request. Raises Unavailable and TooLong.

        An answer without a limit may fill the context; where the KV cache cannot hold that for all slots at once, as on
        a card, a slot's share of it or 1,024 tokens: room for all of it is kept from the start.
        """
        context, length = self.scheduler.max_seq_len, len(request.prompt)
        room = context - length
        if room < 1:
            raise TooLong(
                f"the prompt has {length} tokens, and the context holds {context} of prompt and answer together: "
                "shorten the prompt"
            )
        max_tokens = request.max_tokens or min(default_max_tokens or max(self.scheduler.slot_share, 1024), room)
        stop_tokens = frozenset() if request.ignore_eos else self.tokenizer.stop_tokens
        generation = Generation(request.prompt, max_tokens, request.sampling, stop_tokens)
        self.scheduler.submit(generation)
        return Answer(request, generation, self.tokenizer)

    def health(self, asked_here: bool) -> tuple[int, dict[str, Any]]:
        """Status and body of GET /health; with the model's whole path where the one who asks is on this machine."""
        scheduler = self.scheduler
        state = scheduler.state
        report: dict[str, Any] = {
            "status": state,
            "model_loaded": state == "healthy",
            "model": self.model,
            "device": scheduler.device,
            "llama_dir": self.folder if self.on_loopback and asked_here else Path(self.folder).name,
            "note": self.note if state == "healthy" else "",
            "uptime_seconds": round(time.monotonic() - self._started, 1),
        }
        if state == "loading":
            doing, done = scheduler.doing
            done = done and round(done, 2)
            report["progress"] = {"doing": doing, "done": done, "seconds": report["uptime_seconds"]}
        if state == "unhealthy":
            report["error"] = scheduler.error
        return (200 if state == "healthy" else 503), {**report, "slots": scheduler.slots(), "queued": scheduler.queued}

    def count(self, path: str, status: int) -> None:
        """Count an answer. Paths that are no endpoint count as one: their number is not the client's to choose."""
        route = route_of(path)
        with self._lock:
            self.responses[route if route in ROUTES else "other", status] += 1

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a new connection a thread of its own.

        Where all are in use, the connection that has waited longest for a request makes way. If none does, a few are
        told that there is no room, each in a moment. Those who take longer over it make way for the next.
        """
        with self._lock:
            crowded = self.connections >= self.max_connections and not self._make_way()
            if crowded:
                self._thin_crowd()
                self._crowd[request] = time.monotonic()
            else:
                self.connections += 1
        handler = CrowdedHandler if crowded else ApiHandler
        thread = threading.Thread(target=self._serve, args=(handler, request, client_address), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads to give
            self._leave(handler, request)
            raise

    def _make_way(self) -> bool:
        """Close the connection that has waited longest for a request; False where none has waited for a while."""
        arrived, latest = arrivals(self._idle), time.monotonic() - LEAST_IDLE_SECONDS
        longest = next((idle for idle, since in self._idle.items() if since < latest and idle not in arrived), None)
        if longest is None:
            return False
        self._cut_off(longest, self._idle)
        return True

    def _thin_crowd(self) -> None:
        """Where the crowd is at its limit, wait until one has been told, or close the oldest, which takes too long."""
        if len(self._crowd) >= CROWD:
            oldest, since = next(iter(self._crowd.items()))
            patience = max(0.0, since + CROWD_SECONDS - time.monotonic())
            if not self._lock.wait_for(lambda: len(self._crowd) < CROWD, patience):
                self._cut_off(oldest, self._crowd)

    @staticmethod
    def _cut_off(connection: socket.socket, known: dict[socket.socket, float]) -> None:
        """Close one of these; its own thread, which waits for it, then ends."""
        del known[connection]
        with contextlib.suppress(OSError):  # it has just gone by itself
            connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, handler: type[ApiHandler], request: socket.socket, client_address: Any) -> None:
        try:
            handler(request, client_address, self)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)
            self._leave(handler, request)

    def _leave(self, handler: type[ApiHandler], request: socket.socket) -> None:
        """A connection has ended."""
        with self._lock:
            if handler.crowded:
                self._crowd.pop(request, None)
            else:
                self.connections -= 1
            self._lock.notify_all()

    @contextlib.contextmanager
    def idle(self, handler: ApiHandler) -> Iterator[None]:
        """The handler's connection waits for a request, and may be closed for the sake of another."""
        with self._lock:
            if not handler.crowded:
                self._idle[handler.connection] = time.monotonic()
            self._lock.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._idle.pop(handler.connection, None)

    def take_room(self, size: int) -> bool:
        """Count `size` bytes of a body as under way; False where they are too many with those that are."""
        with self._lock:
            if self._bodies + size > MAX_BODIES_BYTES:
                return False
            self._bodies += size
        return True

    def give_room(self, size: int) -> None:
        """Bodies of that size are done with."""
        with self._lock:
            self._bodies -= size

    def watch(self, connection: socket.socket, answer: Answer | None) -> None:
        """The connection waits for this answer; for none any more."""
        with self._lock:
            if answer:
                self._answers[connection] = answer
            else:
                self._answers.pop(connection, None)

    def service_actions(self) -> None:
        """Twice a second, in the thread that accepts connections: give up the answers that nobody waits for any more.

        In one place for all: if each of 2,000 waiting threads looked after its own, nobody else would get to run.
        """
        if time.monotonic() - self._looked < 0.5:
            return
        with self._lock:
            answers = dict(self._answers)
        for connection in hung_up(answers):
            answers[connection].client_gone = True
            self.scheduler.cancel(answers[connection].generation)
        self._looked = time.monotonic()

    @property
    def under_way(self) -> int:
        """Requests that are queued or generated, or whose answer is being delivered."""
        return len(self._answers)

    def wait_until_idle(self, seconds: float) -> None:
        """Wait, so many seconds at most, until no request is being answered."""
        with self._lock:
            self._lock.wait_for(lambda: len(self._idle) >= self.connections, timeout=seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke outside any request is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("an error in the server on a connection")


# ======================================================================================================================
# CLI
# ======================================================================================================================

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DRAIN_SECONDS = 60  # that requests in flight have to finish when the server is asked to stop
DEFAULT_MAX_SEQ_LEN = 8192


EXAMPLES = """examples:
  python3 tt_api_server.py --model ~/models/Llama-3.1-8B-Instruct --port 8000
  TT_API_KEY=$(cat key) python3 tt_api_server.py --host 0.0.0.0
  python3 tt_api_server.py --device cpu --max-batch-size 4 --max-seq-len 2048
"""


class ArgumentParser(argparse.ArgumentParser):
    """One that suggests the option that was meant."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong. Raises UserError."""
        mistyped = re.split("[ =]", message.partition("unrecognized arguments: ")[2])[0]
        near = [f"--model {mistyped}"] if os.path.isdir(mistyped) else []
        near = near or difflib.get_close_matches(mistyped, self._option_string_actions, 1)
        raise UserError(f"{message}: did you mean {near[0]}?" if near else f"{message} (--help shows all options)")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""

    def count(low: int, high: int) -> Callable[[str], int]:
        def parse(text: str) -> int:
            if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
                raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
            return int(text)

        return parse

    def site(text: str) -> str:
        if not re.fullmatch(r"\*|https?://[^/]+/?", text):
            raise argparse.ArgumentTypeError(f"must be *, or scheme and host as in https://app.example, not {text!r}")
        return text.rstrip("/")

    parser = ArgumentParser(
        prog="tt_api_server.py",
        description=(__doc__ or "").partition("\nThe rooms of this file")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what is served").add_argument
    model = "folder of a Llama 3 model (environment: HF_MODEL, else LLAMA_DIR; default: a demo)"
    add("--model", metavar="DIR", help=model)
    add("--device", choices=("auto", "tt", "cpu"), default="auto", help="where the model runs (default: auto)")
    together = "requests that are answered together (default: 32)"
    add("--max-batch-size", type=count(1, 1024), default=32, metavar="N", help=together)
    length = f"tokens of a prompt and its answer (default: {DEFAULT_MAX_SEQ_LEN}, or the model's own if that is less)"
    add("--max-seq-len", type=count(32, 1_000_000), metavar="N", help=length)
    queued = "requests that may wait for a slot (default: 256)"
    add("--max-queue", type=count(0, 1_000_000), default=256, metavar="N", help=queued)
    add = parser.add_argument_group("to whom").add_argument
    add("--port", type=count(0, 65535), default=8080, help="port to listen on; 0: any free one (default: 8080)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    key = "asked of everyone but /health; `ps` shows it, so better set it in the environment: TT_API_KEY"
    add("--api-key", metavar="KEY", default=os.environ.get("TT_API_KEY"), help=key)
    origin = "a site whose pages may ask, beside this machine's; may be repeated; *: any"
    add("--allow-origin", action="append", type=site, default=[], metavar="ORIGIN", help=origin)
    card = "on a card (environment: MESH_DEVICE names the board, TT_METAL_HOME the checkout)"
    add = parser.add_argument_group(card).add_argument
    add("--accuracy", action="store_true", help="tt-metal's settings for accuracy rather than for performance")
    copies = "N copies of the model, each on its chips"
    add("--data-parallel", type=count(1, 32), default=1, metavar="N", help=copies)
    add("--no-trace", action="store_true", help="do without traces, to debug; slower")
    add = parser.add_argument_group("about").add_argument
    add("--verbose", action="store_true", help="log more: prompts, refusals, who asks for /health, what ttnn says")
    add("--version", action="version", version=f"tt_api_server {__version__}")
    return parser.parse_args(arguments)


def bind(host: str, port: int) -> ApiServer:
    """Listen, or say in one line why not. Done before anything is loaded."""
    if not host:  # which would be all addresses
        raise UserError("--host is empty: give an address, or leave it out")
    try:
        return ApiServer(host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UserError(
                f"cannot listen on {host}, port {port} ({error.strerror or error}): --host takes an address of this "
                "machine, 127.0.0.1 for itself alone, 0.0.0.0 for all"
            ) from error
        for other in range(port + 1, min(port + 100, 65536)):
            with contextlib.suppress(OSError):
                ApiServer(host, other).server_close()
                raise UserError(
                    f"port {port} is in use: stop the program that has it, or take one that is free: --port {other}"
                ) from error
        raise UserError(f"port {port} is in use: stop the program that has it, or take another with --port") from error


def room_for_connections(slots: int, queued: int) -> int:
    """How many connections may be open: as many as are of use, or as the files that this process may have allow.

    The system's soft limit is raised as far as it goes. Raises UserError where not even the slots can be used.
    """
    wanted, other = slots + queued + SPARE_CONNECTIONS, CROWD + 128  # files: the crowd's, the model's, the libraries'
    needed = wanted + other
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below a hard one of infinity
        more = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        soft = more
    most = min(wanted, soft - other)
    if most < slots:
        raise UserError(
            f"this system lets a process open {soft} files, too few for {slots} slots: have its hard limit raised to "
            f"{needed}, or lower --max-batch-size"
        )
    if most < wanted:
        logger.warning("%d connections at most, for this system lets a process open %d files", most, soft)
    return most


class Output(io.RawIOBase):
    """Standard output or standard error, written by a thread of its own.

    A pipe that nobody reads holds nobody up, and a terminal that is gone or a full disk ends nothing: what cannot be
    written is lost.
    """

    _pieces: ClassVar[queue.Queue[tuple[int, bytes]]] = queue.Queue(10_000)  # of both, so that their order stays

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """1 or 2."""
        return self._number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._number)

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Have it written."""
        with contextlib.suppress(queue.Full):
            self._pieces.put_nowait((self._number, bytes(data)))
        return len(data)

    @classmethod
    def start(cls) -> None:
        """Put this in the place of standard output and standard error."""
        # Where they are closed, no socket shall have their numbers, and what libraries write.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        for name, number in (("stdout", 1), ("stderr", 2)):
            encoding = getattr(getattr(sys, name), "encoding", None)
            lines = io.BufferedWriter(cls(number))
            setattr(sys, name, io.TextIOWrapper(lines, encoding, "backslashreplace", line_buffering=True))
        threading.Thread(target=cls._run, name="output", daemon=True).start()
        atexit.register(cls.finish)  # for a traceback that ends the program

    @classmethod
    def _run(cls) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are for the main thread
        while True:
            number, data = cls._pieces.get()
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(number, data) :]
            cls._pieces.task_done()

    @classmethod
    def finish(cls) -> None:
        """Wait until all is written, a second at most."""
        deadline = time.monotonic() + 1
        while cls._pieces.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)


class Terminal:
    """Progress for people: one line that is written over on a terminal, a line for each stage elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = ""
        self._began = time.monotonic()

    def __call__(self, doing: str, done: float | None = None) -> None:
        """Show it."""
        seconds = time.monotonic() - self._began
        if self._live:
            filled = "" if done is None else f" [{'#' * round(30 * done):30}] {done:4.0%}"
            line = f"  {doing}{filled}  {seconds:.0f} s"
            ending = "\n" if doing == "ready" else ""
            print(f"\r{line.ljust(len(self._shown))}", end=ending, file=sys.stderr)
            self._shown = line
        elif doing != self._shown:
            print(f"  {doing}  {seconds:.0f} s", file=sys.stderr)
            self._shown = doing


def choose_device(options: argparse.Namespace, found: Checkpoint | None) -> str:
    """Where the model runs, "tt" or "cpu".

    Only the demo passes a card over, and says so. What else a card lacks is an error that says how to get it.
    """
    if options.device == "cpu" or (options.device == "auto" and (found is None or not card_present())):
        if options.accuracy or options.no_trace or options.data_parallel > 1:
            raise UserError(
                "--accuracy, --data-parallel and --no-trace are for a model on a card, and this runs on the CPU: "
                "leave them out"
            )
        return "cpu"
    if not card_present():
        raise UserError("no Tenstorrent card is here (/dev/tenstorrent is empty): use --device cpu")
    if found is None:
        raise UserError(
            "--device tt wants a model: --model ~/models/Llama-3.1-8B-Instruct; the demo runs on the CPU alone"
        )
    find_tt_metal()
    return "tt"


def choose_length(options: argparse.Namespace, config: LlamaConfig) -> int:
    """The tokens of a slot: --max-seq-len, or by default what the model was made for, within DEFAULT_MAX_SEQ_LEN."""
    longest = config.max_position
    if (options.max_seq_len or 0) > longest:
        raise UserError(f"--max-seq-len {options.max_seq_len} is more than the model was made for: {longest} at most")
    return options.max_seq_len or min(longest, DEFAULT_MAX_SEQ_LEN)


def open_engine(checkpoint: Checkpoint, device: str, options: argparse.Namespace, progress: Progress) -> Engine:
    """Load the model on the device."""
    max_seq_len = choose_length(options, checkpoint.config)
    if device == "cpu":
        return TorchEngine(checkpoint, options.max_batch_size, max_seq_len, progress)
    return TTEngine(
        checkpoint,
        options.max_batch_size,
        max_seq_len,
        progress,
        accuracy=options.accuracy,
        data_parallel=options.data_parallel,
        trace=not options.no_trace,
        verbose=options.verbose,
    )


def serve(options: argparse.Namespace) -> int:
    """Bind, load, serve, stop; returns the exit status."""
    if options.api_key == "":
        raise UserError("the API key is empty: give one, or neither TT_API_KEY nor --api-key")
    if options.api_key and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", options.api_key):
        raise UserError("the API key may have printable ASCII characters alone, and no space at an end: take another")
    server = bind(options.host, options.port)
    server.api_key, server.allowed_origins = options.api_key, options.allow_origin
    slots = options.max_batch_size * options.data_parallel
    server.max_connections = room_for_connections(slots, options.max_queue)
    host = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
    host = "localhost" if server.server_name in ("0.0.0.0", "::") else host
    url = f"http://{host}:{server.server_port}"
    found = find_checkpoint(options.model)
    device = choose_device(options, found)
    if found:
        choose_length(options, found.config)  # an error is known before anything is loaded
    server.model, server.folder = (found.name, str(found.folder)) if found else (DEMO_NAME, "")
    print("Llama API Server on Tenstorrent\n" + "=" * 60)
    if found:
        note = f" ({found.note})" if found.note and device == "cpu" else ""
        print(f"Model:  {found.name}, {found.folder}{note}")
    else:
        server.note = DEMO_NOTE
        print(f"Model:  none given (--model, HF_MODEL, LLAMA_DIR): a tiny demo, {DEMO_NAME}, is served on the CPU")
    print(f"Health: {url}/health, while it loads too\n")
    if not server.on_loopback and not server.api_key:
        logger.warning("anyone who can reach this machine can use this server: set TT_API_KEY to ask for a key")

    def load(progress: Progress) -> Engine:
        progress("importing PyTorch")
        import_torch()
        checkpoint = found or demo_checkpoint(progress)
        server.folder = str(checkpoint.folder)
        progress("loading the tokenizer")
        server.tokenizer = ChatTokenizer(checkpoint.tokenizer_model)
        engine = open_engine(checkpoint, device, options, progress)
        # What is loaded stays: to look through it for garbage again and again would hold all threads up for 0.2 s.
        gc.freeze()
        return engine

    # What happens to the process: "signal" from Ctrl+C and SIGTERM, "ready" and "ended" from the scheduler.
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: events.put("signal"))
    # The threads to come inherit this: a signal that one of them took would not wake the main thread, which acts on it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    server.scheduler = scheduler = Scheduler(load, options.max_queue, Terminal(), events.put)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    scheduler.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    event = events.get()
    if event == "ready":
        print(ready_message(url, scheduler.device, bool(server.api_key)))
        notify_systemd("READY=1")
        event = events.get()
        if event == "ended" and "NOTIFY_SOCKET" not in os.environ:  # else systemd is to start it again
            event = events.get()  # the engine has failed for good: /health says so until someone stops the server
    if event == "ended" and scheduler.failure:
        raise scheduler.failure
    cut_short = False
    if event == "signal":
        notify_systemd("STOPPING=1")
        if server.under_way:
            print(f"\nStopping when all is answered ({server.under_way}). Press CTRL+C again to cut it short.")
        cut_short = not drain(server, events)
    server.wait_until_idle(seconds=2)
    status = 1 if scheduler.error else 128 + signal.SIGINT if cut_short else 0
    print("\nStopped." if status == 0 else "\nStopped before all was done.")
    return status


def notify_systemd(state: str) -> None:
    """Tell systemd, where it started this with Type=notify. Source: sd_notify(3)."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.connect(f"\0{address[1:]}" if address.startswith("@") else address)
                sender.send(state.encode())
        except OSError as error:
            logger.warning("systemd does not hear %s at NOTIFY_SOCKET: %s", state, error)


def drain(server: ApiServer, events: queue.SimpleQueue[str]) -> bool:
    """Let the requests under way be answered, within DRAIN_SECONDS and until the next signal; returns whether all were.

    Ends the scheduler, and with it the engine, in any case.
    """
    scheduler = server.scheduler
    scheduler.stop(drain=True)
    deadline = time.monotonic() + (0 if scheduler.error else DRAIN_SECONDS)
    while (server.under_way or not scheduler.ended) and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            if events.get(timeout=0.05) == "signal":
                break
    cut_short = server.under_way > 0
    scheduler.stop(drain=False)
    deadline = time.monotonic() + 10
    while not scheduler.ended and time.monotonic() < deadline:
        time.sleep(0.05)
    return scheduler.ended and not cut_short


def ready_message(url: str, device: str, wants_key: bool) -> str:
    """The second half of the banner."""
    key = " -H 'Authorization: Bearer KEY'" if wants_key else ""
    endpoints = "\n".join(f"  {method:4} {url}{path}" for path, (method, _) in ROUTES.items())
    return f"""
Server ready on {url} ({device})

Endpoints:
{endpoints}

Try it:
  curl -s {url}/chat{key} -H 'Content-Type: application/json' -d '{{"prompt": "What is machine learning?"}}'

Press CTRL+C to stop the server
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 stopped as asked, 1 the engine failed, 2 a UserError, 130 requests were cut short."""
    Output.start()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        options = parse_arguments(arguments)
        logger.setLevel(logging.DEBUG if options.verbose else logging.INFO)
        return serve(options)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_status = main()
    Output.finish()
    # All is closed that needs closing. The interpreter's own way out would wait for threads in the middle of a load,
    # and print pages of warnings about what ttnn's bindings still hold.
    os._exit(exit_status)
