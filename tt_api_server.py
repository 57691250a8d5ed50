#!/usr/bin/env python3
"""tt_api_server: serve a language model over HTTP, on a Tenstorrent card or on the CPU.

    python3 tt_api_server.py --port 8080                     # without a model: a tiny demo, trained in seconds
    python3 tt_api_server.py --model ~/models/Llama-3.1-8B-Instruct
    python3 tt_api_server.py --check                         # is the card right, and how fast?

    curl -s localhost:8080/chat -H 'Content-Type: application/json' -d '{"prompt": "What is machine learning?"}' | jq

The model is loaded once and stays loaded. Requests share each step of the engine (continuous batching).

    GET  /                      a chat page for browsers
    GET  /health                state, model, device and load
    POST /chat                  {"prompt": ...} or {"messages": [...]}; optional: system, max_tokens, temperature,
                                top_p, top_k, seed, stop, stream, chat_template_kwargs
    POST /v1/chat/completions   OpenAI's API; also /v1/responses, /v1/completions and /v1/models, and vLLM's /tokenize
                                and /detokenize
    POST /v1/messages           Anthropic's API, for Claude Code; also /v1/messages/count_tokens
    GET  /metrics               metrics for Prometheus

The rooms of this file, top to bottom; each uses only those above it:

    Errors         one exception for the user at the terminal, one for the HTTP client
    Checkpoint     find the model's files and read its configuration
    Text           messages to token ids, token ids to text
    Answers        an answer's tokens to pieces: text, thinking, tool calls
    Grammars       what an answer must be: calls and schemas, in llguidance's processes
    Sampling       logits to the next token
    Engine         the contract of every engine: tokens in, tokens out
    CPU engine     the model in PyTorch
    Card engine    the model on Tenstorrent cards, through tt-metal's Generator
    Demo model     a tiny Llama for a start without a model
    Scheduler      the one thread that runs the engine: continuous batching, prefix reuse, statistics
    Fields         the fields of every body, and what each may be
    Requests       a reader for each dialect: JSON to Asked; and Asked to Requests
    Writers        a writer for each dialect: pieces to JSON
    Page           the chat page
    HTTP           sockets, routes, errors, metrics
    Check          whether an engine is right, and how fast
    CLI            options, banner, signals, start and stop

The way of a request:

    socket - ApiHandler - a reader of one dialect - Asked - Tokenizer, Grammars - Request - Scheduler - Engine
                                                                                               |
    socket - ApiHandler - a writer of one dialect - Piece - Reader - a queue of Events --------+

A handler's thread owns its socket and its text; the scheduler's thread owns the engine and the token ids.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import gc
import hashlib
import hmac
import http.client
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import json.scanner
import logging
import logging.handlers
import math
import mmap
import multiprocessing
import operator
import os
import pickle
import platform
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.parse
import uuid
import warnings
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Protocol

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F

if sys.version_info < (3, 10):  # noqa: UP036
    raise SystemExit(f"error: this is Python {sys.version.split()[0]}: use Python 3.10 or later")

__version__ = "2.2.0"

logger = logging.getLogger("tt_api_server")

# bytes of JSON: a larger body is read without haste, after others that are as large
LARGE = 1 << 16
MAX_DEPTH = 64  # of lists and objects in a client's JSON: more than any real schema has


# ==================================================================================================
# Errors
# ==================================================================================================


class UserError(Exception):
    """For the user at the terminal: one plain sentence that says what is wrong and what to do."""


class ApiError(Exception):
    """For the HTTP client: a status, one plain sentence, and OpenAI's `param` and `code` if the
    error has them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


def printable(text: str | None) -> str:
    """Shorten `text` and replace control characters, for logs and errors."""
    text = text or "-"
    return "".join(
        c if c.isprintable() else "?" for c in (text if len(text) <= 100 else f"{text[:97]}...")
    )


def shown(value: Any) -> str:
    """Format a JSON value for an error message."""
    parts = json.JSONEncoder(ensure_ascii=False).iterencode(value)
    return printable("".join(itertools.islice(parts, 101)))  # the rest would not be shown


class SlowJson(json.JSONDecoder):
    """Reads JSON in Python. The reader in C is faster, and stops all threads until it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def from_json(text: str | bytes) -> Any:
    """The value of a client's JSON. Raises ValueError, also if it is nested too deeply."""
    with contextlib.suppress(RecursionError):
        value = json.loads(text, cls=SlowJson if len(text) > LARGE else None)
        if fits_depth(value, MAX_DEPTH):
            return value
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def fits_depth(value: Any, most: int) -> bool:
    """Whether lists and objects in a JSON value are nested `most` deep at most."""
    if not isinstance(value, (dict, list)):
        return True
    return most > 0 and all(fits_depth(entry, most - 1) for entry in entries(value))


def entries(value: Any) -> Iterable[Any]:
    """The values in a JSON list or object; none in any other value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def long_json(value: Any) -> bytes:
    """`value` as one line of JSON in UTF-8, in small steps: to write megabytes in one would stop all
    other threads.
    """
    pieces = json.JSONEncoder(ensure_ascii=False).iterencode(value)
    return "".join(pieces).encode(errors="replace") + b"\n"


def as_list(value: Any) -> list[Any]:
    """A list as it is, and anything else as the one item of a list."""
    return value if isinstance(value, list) else [value]


def import_torch() -> None:
    """Import `torch` and `F` late: it takes seconds, and most user errors can be reported
    before.
    """
    global torch, F
    # A waiting OpenMP thread spins, which makes a step up to ten times slower if another program
    # needs the core. Spin only for a short time, then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN keeps the code that it compiles for each shape, up to 0.3 MB, 1,024 times.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "400")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "400")  # PyTorch's own, on top of it
    with warnings.catch_warnings():
        # NumPy is not used here
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        try:
            import torch
            import torch.nn.functional as F
        except ImportError as error:
            cure = "activate the virtual environment first (. .venv/bin/activate) or pip install -r requirements.txt"
            raise UserError(f"PyTorch cannot be imported ({error}): {cure}") from error


# ==================================================================================================
# Checkpoint
# ==================================================================================================

LLAMA3_VOCABULARY = 128256  # tokens of every Llama 3 text model
# A layer's weights that only some families have: Meta's name, Hugging Face's, and the shape.
FAMILIES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "llama": (),
    "mistral": (),
    "qwen2": (
        ("layers.{}.attention.wq.bias", "model.layers.{}.self_attn.q_proj.bias", "q"),
        ("layers.{}.attention.wk.bias", "model.layers.{}.self_attn.k_proj.bias", "kv"),
        ("layers.{}.attention.wv.bias", "model.layers.{}.self_attn.v_proj.bias", "kv"),
    ),
    "qwen3": (
        ("layers.{}.attention.q_norm.weight", "model.layers.{}.self_attn.q_norm.weight", "head"),
        ("layers.{}.attention.k_norm.weight", "model.layers.{}.self_attn.k_norm.weight", "head"),
    ),
    "phi3": (),
}
# Phi-3's tensors that hold several of the others, one below the other, and their rows.
FUSED = {
    "self_attn.qkv_proj": {"self_attn.q_proj": "q", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
    "mlp.gate_up_proj": {"mlp.gate_proj": "ffn", "mlp.up_proj": "ffn"},
}  # fmt: skip
# The files at Hugging Face that tell of a model, for this server and for tt-metal.
SETTINGS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
NAME_FOLDER = "name a folder with config.json, model.safetensors or its index, and tokenizer.json"
NAME_ANOTHER = f"name a text model of the family {', '.join(FAMILIES)} in bfloat16"
NAME_ANOTHER += ", not a quantized copy (GPTQ, AWQ, FP8, MLX)"

# The settings of the rotary wavelengths' stretching, of Llama 3.1's and of Phi-3's for long contexts.
ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
# The settings of config.json that change what transformers computes, and the values that are
# supported. If a setting is absent, the first value is meant, as in transformers.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "quantization": (None,),  # MLX's name
    "rope_type": tuple(ROPES),
    "partial_rotary_factor": (1.0, None),
}
# transformers' defaults, by family, for what config.json may leave out.
SOMETIMES = ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "head_dim")
DEFAULTS = {  # None: it follows from the others
    "llama": (1e-6, 2048, None, None),
    "mistral": (1e-6, 131072, 8, None),
    "qwen2": (1e-6, 32768, 32, None),
    "qwen3": (1e-6, 32768, 32, 128),
    "phi3": (1e-5, 4096, None, None),
}
# What Meta's params.json calls the settings of config.json, and what else it may have.
PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
}
MORE_PARAMS = {"ffn_dim_multiplier", "multiple_of", "use_scaled_rope"}
MORE_PARAMS |= {"max_batch_size", "max_seq_len"}  # which say nothing of the model
# The settings of generation_config.json that are a request's defaults: lowest and highest value.
GENERATION = {
    "temperature": (0.0, 2),
    "top_p": (0.0, 1),
    "top_k": (0, math.inf),  # a whole number
    "min_p": (0.0, 1),
    "repetition_penalty": (0.01, 100),
}
WEIGHTS = (  # of all families, in the same form; {} is the number of the layer
    ("tok_embeddings.weight", "model.embed_tokens.weight", "vocabulary dim"),
    ("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", "dim"),
    ("layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight", "q dim"),
    ("layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight", "kv dim"),
    ("layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight", "kv dim"),
    ("layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight", "dim q"),
    ("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", "dim"),
    ("layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight", "ffn dim"),
    ("layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight", "dim ffn"),
    ("layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight", "ffn dim"),
    ("norm.weight", "model.norm.weight", "dim"),
    ("output.weight", "lm_head.weight", "vocabulary dim"),
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model."""

    family: str
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    max_position: int  # tokens of the longest context
    rope_scaling: dict[str, Any] | None  # see ROPES
    tied: bool  # the embedding is the output matrix, if the checkpoint has no other

    @staticmethod
    def read(config: dict[str, Any]) -> ModelConfig:
        """Read the content of a config.json.

        Raises UserError, and KeyError or ValueError if it is damaged.
        """
        # transformers 5; 4
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        settings = {"rope_type": rope.get("type", "default"), **config, **rope}
        for name, values in SUPPORTED.items():
            if (value := settings.get(name, values[0])) not in values:
                wanted = " or ".join(map(shown, values))
                raise UserError(
                    f"{name} is {shown(value)}, and only {wanted} is supported: {NAME_ANOTHER}"
                )
        family = settings["model_type"]
        settings = {"rope_theta": 10000.0, **dict(zip(SOMETIMES, DEFAULTS[family])), **settings}
        dim, heads = settings["hidden_size"], settings["num_attention_heads"]
        # Attention has no sliding window here, so the context ends where a window would begin to
        # slide.
        slides = settings.get("use_sliding_window", family in ("mistral", "phi3"))
        window = settings.get("sliding_window", 4096 if family == "mistral" else None)
        numbers = {
            "vocab_size": settings["vocab_size"],
            "dim": dim,
            "n_layers": settings["num_hidden_layers"],
            "n_heads": heads,
            "n_kv_heads": settings["num_key_value_heads"] or heads,
            "head_dim": settings["head_dim"] or dim // heads,
            "ffn_dim": settings["intermediate_size"],
            "norm_eps": settings["rms_norm_eps"],
            "rope_theta": settings["rope_theta"],
            "max_position": min(
                settings["max_position_embeddings"], (slides and window) or math.inf
            ),
        }
        scaling = {name: settings[name] for name in ROPES[settings["rope_type"]]}
        for name, value in {**numbers, **scaling}.items():
            if any(part <= 0 for part in as_list(value)):
                raise ValueError(f"{name} is {shown(value)}")
        tied = bool(settings.get("tie_word_embeddings"))
        return ModelConfig(family, **numbers, rope_scaling=scaling or None, tied=tied)

    @property
    def sizes(self) -> dict[str, int]:
        """What the tables of weights call a size."""
        return {
            "vocabulary": self.vocab_size,
            "dim": self.dim,
            "ffn": self.ffn_dim,
            "head": self.head_dim,
            "q": self.n_heads * self.head_dim,
            "kv": self.n_kv_heads * self.head_dim,
        }

    def weights(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Meta's name of every weight, with Hugging Face's name and the shape."""
        sizes = self.sizes
        return {
            meta.format(i): (hf.format(i), tuple(sizes[size] for size in shape.split()))
            for meta, hf, shape in WEIGHTS + FAMILIES[self.family]
            for i in range(self.n_layers if "{}" in meta else 1)
        }


def config_of_params(params: dict[str, Any]) -> dict[str, Any]:
    """Meta's params.json as the config.json of the same model.

    Raises UserError for a setting that is unknown.
    """
    if (vocabulary := params["vocab_size"]) != LLAMA3_VOCABULARY:
        raise UserError(
            f"vocab_size is {shown(vocabulary)}, and only Llama 3 is supported in Meta's layout"
        )
    if unknown := params.keys() - PARAMS.keys() - MORE_PARAMS:
        raise UserError(f"params.json has {min(unknown)}, which is not supported: {NAME_ANOTHER}")
    dim, multiple = params["dim"], params["multiple_of"]
    ffn_dim = int(params["ffn_dim_multiplier"] * int(8 * dim / 3))
    config = {
        "model_type": "llama",
        "intermediate_size": -(-ffn_dim // multiple) * multiple,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        **{name: params[metas_name] for metas_name, name in PARAMS.items()},
    }
    if params.get("use_scaled_rope"):
        # params.json does not tell Llama 3.2's scaling factor from 3.1's and 3.3's. The width does:
        # the text models of 3.2 are 2048 and 3072 wide, all others 4096 or more.
        factors = (32.0 if dim <= 3072 else 8.0, 1.0, 4.0, 8192)
        config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPES["llama3"], factors))}
        config["max_position_embeddings"] = 131072
    return config


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model; `open_weights` reads its weights."""

    # with the weights: one .pth in Meta's layout, or .safetensors in Hugging Face's
    files: Sequence[Path]
    hf_folder: Path | None  # with config.json
    config: ModelConfig
    name: str
    stop_tokens: frozenset[int]  # that end an answer, by the model's configuration
    defaults: Mapping[str, float]  # of a request, by generation_config.json: see GENERATION
    repository: str = ""  # OWNER/NAME at Hugging Face, from where the weights are still to come

    @property
    def folder(self) -> Path:
        """The folder of the weights."""
        return self.files[0].parent

    def open_weights(self) -> Callable[[str], torch.Tensor]:
        """Map the files and return a reader, which takes Meta's name of a weight and gives the
        tensor, still on disk.

        Checks the presence and shape of every tensor first. The reader gives the embedding for a
        tied model's output.weight. Rotary pairs are half a head apart in wq and wk, as in Hugging
        Face's files; Meta's files have them side by side, and are reordered.
        """
        meta = self.files[0].suffix == ".pth"
        stored = {name: tensor for path in self.files for name, tensor in open_file(path).items()}
        split_fused(stored, self.config)
        weights = self.config.weights()
        own_names = {name: name if meta else hf for name, (hf, _) in weights.items()}
        if "norm.weight" in stored:  # Meta's layout, or a model saved without its head
            own_names = {name: own.removeprefix("model.") for name, own in own_names.items()}
        if self.config.tied and own_names["output.weight"] not in stored:
            own_names["output.weight"] = own_names["tok_embeddings.weight"]
        # What is too much comes first: a quantized model has it in place of what is missing.
        for own_name in sorted(stored.keys() - own_names.values()):
            # tables, which are computed here
            if not own_name.endswith(("rope.freqs", "rotary_emb.inv_freq")):
                raise UserError(
                    f"{self.folder}: the tensor {own_name} is not supported: {NAME_ANOTHER}"
                )
        for name, (_, shape) in weights.items():
            tensor = stored.get(own_names[name])
            if tensor is None or tensor.shape != shape:
                problem = "is missing"
                if tensor is not None:
                    problem = f"has the shape {list(tensor.shape)}, not {list(shape)}"
                cure = "download the checkpoint again, or save it as an AutoModelForCausalLM"
                raise UserError(f"{self.folder}: the tensor {own_names[name]} {problem}: {cure}")

        def read(name: str) -> torch.Tensor:
            tensor = stored[own_names[name]]
            # pairs i, i + 1 to i, i + head_dim / 2
            if meta and name.endswith(("wq.weight", "wk.weight")):
                pairs = tensor.view(-1, self.config.head_dim // 2, 2, self.config.dim)
                return pairs.transpose(1, 2).reshape(tensor.shape)
            return tensor

        return read


def split_fused(stored: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Replace the tensors that hold several others by these."""
    for name in list(stored):
        for fused, parts in FUSED.items():
            rows = [config.sizes[size] for size in parts.values()]
            if f".{fused}." in name and len(stored[name]) == sum(rows):
                for part, tensor in zip(parts, torch.split(stored.pop(name), rows)):
                    stored[name.replace(fused, part)] = tensor


def open_file(path: Path) -> dict[str, torch.Tensor]:
    """Memory-map a file; return its tensors by name."""
    try:
        if path.suffix == ".pth":
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {name: tensor.detach() for name, tensor in tensors.items()}
        from safetensors import safe_open

        file: Any = safe_open(path, framework="pt")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ImportError as error:
        raise UserError(f"{path} needs a package: pip install safetensors") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # by where the file ends: RuntimeError, UnpicklingError, EOFError, SafetensorError ...
        problem = "is cut short or damaged, or holds more than tensors"
        raise UserError(f"{path} {problem}: download the original file again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(content, dict):
            return content
        raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): download the checkpoint again"
        ) from error


def home_path(path: str) -> Path:
    """`path` with ~ and variables filled in.

    Raises UserError if the home directory is not known.
    """
    if (expanded := os.path.expanduser(os.path.expandvars(path))).startswith("~"):
        raise UserError(
            f"{path} does not exist: no such home directory is known; set HOME, or XDG_CACHE_HOME for caches"
        )
    return Path(os.path.abspath(expanded))


def cached_model(name: str) -> Path:
    """The folder of OWNER/NAME in Hugging Face's cache, by huggingface_hub's variables in its own
    order.
    """
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    hub = os.path.join(os.environ.get("HF_HOME", cache), "hub")
    hub = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", hub))
    model = home_path(hub) / f"models--{name.replace('/', '--')}"
    revision = model / "refs" / "main"
    return model / "snapshots" / (revision.read_text().strip() if revision.is_file() else "none")


def find_checkpoint(model: str | None) -> Checkpoint | None:
    """The checkpoint that --model (`model`), HF_MODEL or LLAMA_DIR names, in this order; None if
    none is set.

    Raises UserError if one is set and leads to no model that can be served.
    """
    if model == "":
        raise UserError("--model is empty: name the model's folder, or leave it out")
    source, name = "--model", model
    for variable in ("HF_MODEL", "LLAMA_DIR"):
        if not name:
            source, name = variable, os.environ.get(variable)
    if not name:
        return None
    folder, repository = home_path(name), ""
    if not os.path.isdir(folder) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        folder = cached_model(name)
        weights = safetensors_files(folder) or list(folder.rglob("consolidated.*.pth"))
        if not weights or not all(path.exists() for path in weights):
            folder, repository = download(name, SETTINGS), name
    try:
        if os.path.isdir(folder):  # Path.is_dir raises an error for a name that is too long
            return read_checkpoint(folder, repository)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): let this user read it"
        ) from error
    raise UserError(f"{source} is {name}, which is not a folder here: {NAME_FOLDER}")


def download(name: str, files: Sequence[str]) -> Path:
    """Bring these files of OWNER/NAME into Hugging Face's cache; return their folder.

    Raises UserError.
    """
    page = f"https://huggingface.co/{name}"
    try:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours is shown
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns="*/*"))
    except ImportError as error:
        raise UserError(
            f"{name} is neither a folder here nor in Hugging Face's cache: pip install huggingface_hub, and it is "
            "downloaded"
        ) from error
    except Exception as error:
        kind, problem = type(error).__name__, str(error).partition("\n")[0]
        cures = {
            "GatedRepoError": f"it is gated: accept its licence at {page}, and run hf auth login",
            "RepositoryNotFoundError": f"there is no {page}, or it is not for you: correct the name, or run hf auth "
            "login",
        }
        other = f"it cannot be downloaded now ({kind}: {problem}): try again, or name a folder"
        cure = cures.get(kind, other)
        raise UserError(f"{name} is not in Hugging Face's cache, and {cure}") from error


def download_weights(checkpoint: Checkpoint, progress: Progress) -> None:
    """Download the weights. What an interrupted download has left is used.

    Raises UserError.
    """
    name, blobs = checkpoint.repository, checkpoint.folder.parents[1] / "blobs"
    size = 2 * sum(math.prod(shape) for _, shape in checkpoint.config.weights().values())
    pool = concurrent.futures.ThreadPoolExecutor(1)
    job = pool.submit(download, name, [path.name for path in checkpoint.files])
    pool.shutdown(wait=False)  # a stop does not wait for it
    held = 0
    while not job.done():
        with contextlib.suppress(FileNotFoundError):  # a file that is complete gets another name
            held = sum(512 * path.lstat().st_blocks for path in blobs.iterdir())
        progress(f"downloading {name}", min(held / size, 1.0))
        concurrent.futures.wait([job], 0.5)
    if not all((job.result() / path.name).exists() for path in checkpoint.files):
        raise UserError(f"{name} has no {checkpoint.files[0].name}: {NAME_ANOTHER}")


def safetensors_files(folder: Path) -> list[Path]:
    """The files that transformers would read: model.safetensors if there is one, or else the files
    of the index.
    """
    whole = folder / "model.safetensors"
    if os.path.lexists(whole):
        return [whole]
    index = folder / "model.safetensors.index.json"
    files = read_json(index).get("weight_map", {})
    try:
        return [folder / name for name in sorted(set(files.values()))]
    except (AttributeError, TypeError) as error:
        problem = "is damaged: its weight_map names no files"
        raise UserError(f"{index} {problem}: download it again") from error


def read_checkpoint(folder: Path, repository: str = "") -> Checkpoint:
    """Choose between the layouts in `folder` and its subfolder `original`, and read the
    configuration.

    `repository`: from where the weights are still to come.
    """
    home = folder.parent if folder.name == "original" else folder
    folders = (folder, home, home / "original")
    meta = next((path for path in folders if (path / "params.json").is_file()), None)
    hf = next((path for path in folders if (path / "config.json").is_file()), None)
    parts = sorted(meta.glob("consolidated.*.pth")) if meta else []
    # .pth needs no further package
    files = parts if len(parts) == 1 else safetensors_files(hf) if hf else []
    if repository and hf and not files:
        files = [hf / "model.safetensors"]
    mistral = (home / "tekken.json").is_file() and not (home / "tokenizer.json").is_file()
    if mistral or not files:
        needs = "it needs params.json and consolidated.00.pth, or config.json and model.safetensors or its index"
        if parts:
            needs = f"{len(parts)} parts (consolidated.*.pth) are not supported: name the folder with its *.safetensors"
        elif mistral:
            needs = f"tekken.json is Mistral's own format: {NAME_FOLDER}, as other copies have"
        elif any(folder.glob("*.gguf")):
            needs = f"GGUF is not supported: {NAME_FOLDER}, as the original model has"
        raise UserError(f"{folder} holds no checkpoint: {needs}")
    # In Hugging Face's cache the folder is models--OWNER--NAME/snapshots/COMMIT.
    cached = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    name = home.parents[1].name.rpartition("--")[2] if cached else home.name
    settings = read_json(hf / "config.json" if hf else files[0].parent / "params.json")
    generation = read_json(home / "generation_config.json")
    try:
        config = ModelConfig.read(settings if hf else config_of_params(settings))
        ends = {*as_list(settings.get("eos_token_id")), *as_list(generation.get("eos_token_id"))}
        stop_tokens = frozenset(map(int, ends - {None}))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        # no such name, null, 0
        raise UserError(
            f"{folder}: the model's configuration is damaged ({error!r}): download it again"
        ) from error
    defaults = read_defaults(generation)
    return Checkpoint(files, hf, config, name, stop_tokens, defaults, repository)


def read_defaults(generation: dict[str, Any]) -> dict[str, float]:
    """A request's defaults in generation_config.json, without those that are not in range."""
    defaults = {
        name: value
        for name, (low, high) in GENERATION.items()
        if isinstance(value := generation.get(name), (int, type(low))) and low <= value <= high
    }
    return defaults | {"temperature": 0} if generation.get("do_sample") is False else defaults


# ==================================================================================================
# Text
# ==================================================================================================

# of a chat template: role and content; tool_calls, tool_call_id or reasoning_content
Message = dict[str, Any]
THINK_TAGS = (("[THINK]", "[/THINK]"), ("<think>", "</think>"))  # Magistral's; everyone else's
CALL_MARKS = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
)
# an answer shows these special tokens: they mean something
SHOWN = {*CALL_MARKS, *itertools.chain(*THINK_TAGS)}
PROMPT_CHARACTERS = 8 << 20  # of a rendered prompt: a template may indent each line of a tool

# Llama 3's chat format and Llama 3.1's tools, for Meta's layout, which has no template.
LLAMA_TEMPLATE = """\
{%- macro turn(role, text) %}
    {{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" + text + "<|eot_id|>" }}
{%- endmacro %}
{%- set given = messages[0].role == "system" %}
{%- set system = messages[0].content | trim if given else "" %}
{%- set functions %}
    {{- "Given the following functions, please respond with a JSON for a function call with its proper arguments " }}
    {{- "that best answers the given prompt.\\n\\nRespond in the format " }}
    {{- '{"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\\n\\n" }}
    {%- for tool in tools or [] %}{{ tool | tojson(indent=4) + "\\n\\n" }}{% endfor %}
{%- endset %}
{{- "<|begin_of_text|>" }}
{%- if tools or messages | selectattr("tool_calls") | list %}
    {%- set dates = "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n" %}
    {%- set environment = "Environment: ipython\\n" if tools else "" %}
    {{- turn("system", environment + dates + system) }}
{%- elif given %}
    {{- turn("system", system) }}
{%- endif %}
{%- for message in (messages[1:] if given else messages) %}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {%- set arguments = call.arguments | tojson %}
        {{- turn("assistant", '{"name": "' + call.name + '", "parameters": ' + arguments + "}") }}
    {%- elif message.role == "tool" %}
        {{- turn("ipython", message.content | tojson) }}
    {%- elif tools and loop.first %}
        {{- turn("user", functions + message.content | trim) }}
    {%- else %}
        {{- turn(message.role, message.content | trim) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}"""


class Llama3Vocabulary:
    """Llama 3's tokenizer.model, through llama-models."""

    size = LLAMA3_VOCABULARY  # of the ids; a model may have more, or fewer
    adds_space = False  # before each text, and so before an answer, as SentencePiece does

    def __init__(self, tokenizer_model: Path | None = None) -> None:
        """Without a file, llama-models' own copy. Raises UserError."""
        # else tiktoken keeps a copy of each path's first file, and another in its place is not read
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
        try:
            from llama_models.llama3.api import tokenizer
        except ImportError as error:
            raise UserError(
                f"llama-models cannot be imported ({error}): pip install -r requirements.txt"
            ) from error
        self.path = tokenizer_model or Path(tokenizer.__file__).parent / "tokenizer.model"
        try:
            self._tokenizer = tokenizer.Tokenizer(str(self.path))
        except (ValueError, AssertionError) as error:
            raise UserError(f"{self.path} is not a Llama 3 tokenizer: download it again") from error
        if (size := self._tokenizer.n_words) != LLAMA3_VOCABULARY:
            raise UserError(f"{self.path} is not a Llama 3 tokenizer: it has {size} tokens")
        # tokens beside the learned ones, by their text, and which only a chat template may write
        self.added: dict[str, int] = self._tokenizer.special_tokens
        self.special = frozenset(self.added)
        self.start: list[int] = [self._tokenizer.bos_id]  # before a plain text

    def encode(self, parts: Sequence[str]) -> list[int]:
        """Token ids of a text that comes in parts, each encoded alone."""
        encode = functools.partial(self._tokenizer.encode, bos=False, eos=False)
        return [token for part in parts for token in encode(part, allowed_special="all")]

    def spell(self, token: int) -> bytes:
        """The UTF-8 of a token, which may be half a character."""
        spelled: bytes = self._tokenizer.model.decode_single_token_bytes(token)
        return spelled


class FileVocabulary:
    """A checkpoint's tokenizer.json, through tokenizers, with what Llama3Vocabulary has."""

    def __init__(self, path: Path) -> None:
        """Raises UserError."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"this model's tokenizer needs a package ({error}): pip install tokenizers"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more precise
            raise UserError(f"{path} cannot be read ({error}): download it again") from error
        self.size: int = self._tokenizer.get_vocab_size()
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.added = {token.content: number for number, token in self._added.items()}
        self.special = frozenset(token.content for token in self._added.values() if token.special)
        probe = self._tokenizer.encode("a")  # its special tokens are those around every text
        self.start: list[int] = probe.ids[: probe.special_tokens_mask.index(0)]
        decoder = json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        self._byte_level = "ByteLevel" in decoder
        self.adds_space = '"Strip"' in decoder or '"Metaspace"' in decoder
        # GPT-2's alphabet: a printable byte is its Latin-1 character, the others are the characters
        # from 256 on.
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = sorted({*range(256)} - {*printed})
        self._bytes = dict(zip(map(chr, [*printed, *range(256, 512)]), [*printed, *others]))

    @functools.cached_property
    def _continuing(self) -> Any:
        """The tokenizer without the space that some put before each text: for what follows a
        cut.
        """
        settings = self._tokenizer.to_str().replace('"prepend":"\u2581"', '"prepend":""')
        settings = re.sub('"prepend_scheme":"[a-z]+"', '"prepend_scheme":"never"', settings)
        return type(self._tokenizer).from_str(settings)

    def encode(self, parts: Sequence[str]) -> list[int]:
        # In batches: encode() would stop all other threads until it is done.
        encoded = self._tokenizer.encode_batch_fast([*parts[:1]], add_special_tokens=False)
        if len(parts) > 1:
            encoded += self._continuing.encode_batch_fast([*parts[1:]], add_special_tokens=False)
        return [token for encoding in encoded for token in encoding.ids]

    def spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        text = self._tokenizer.id_to_token(token) or ""  # a model's vocabulary may be padded
        if self._byte_level and self._bytes.keys() >= set(text):
            return bytes(map(self._bytes.__getitem__, text))
        byte = re.fullmatch("<0x(..)>", text)  # SentencePiece's
        return bytes.fromhex(byte[1]) if byte else text.replace("\u2581", " ").encode()


Vocabulary = Llama3Vocabulary | FileVocabulary


class ChatTemplate:
    """A chat template in Jinja, rendered as transformers does, in a sandbox.

    If a message spells a special token, the token is cut in two before the template is rendered,
    and so stays text.
    """

    CUT = "\ud800"  # a lone surrogate, which `inert` removes from every text

    def __init__(self, source: str, special: Iterable[str], **tokens: str) -> None:
        """`tokens` are bos_token and its like. Raises UserError."""
        import jinja2.sandbox

        @jinja2.pass_context
        def tojson(context: Any, value: Any, **options: Any) -> str:
            encoder = json.JSONEncoder(**{"ensure_ascii": False, **options})
            return "".join(map(context["count"], encoder.iterencode(value)))

        def refuse(reason: str) -> NoReturn:
            raise jinja2.TemplateError(reason)

        self.source = source
        self._special = {token for token in special if len(token) > 1}
        starts = {f"{re.escape(token[0])}(?={re.escape(token[1:4])})" for token in self._special}
        self._starts = re.compile("|".join(starts) or "(?!)")
        self._lengths = {len(token) for token in self._special}
        self._one_call = "tool_calls[0]" in source  # Llama 3's templates take one call a message
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime, **tokens}
        # {% generation %} marks what a model is trained on: a comment.
        source = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", source)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the model's chat template cannot be read ({error}): download it again"
            ) from error

    def render(
        self, messages: Sequence[Message], tools: Sequence[Message], **options: bool
    ) -> list[str]:
        """The prompt in parts, which are encoded one by one. `options` are the template's.

        Raises ApiError if the template refuses the messages.
        """
        if not self.source:
            raise ApiError(400, "this model has no chat template: send a prompt to /v1/completions")
        if self._one_call:
            messages = [single for message in messages for single in single_calls(message)]
        try:
            prompt = self._template.render(
                messages=self.inert(list(messages)),
                tools=self.inert(list(tools)) or None,
                count=character_count(),
                **options,
            )
            return prompt.split(self.CUT)
        except ApiError:
            raise
        except Exception as error:  # a template can fail in any way
            raise ApiError(
                400, f"the model's chat template refuses the messages: {printable(str(error))}"
            ) from error

    def inert(self, value: Any) -> Any:
        """A JSON value with the special tokens in its texts cut in two, and U+FFFD for lone
        surrogates, which JSON can spell and UTF-8 cannot.
        """
        if isinstance(value, dict):
            return {self.inert(name): self.inert(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [self.inert(entry) for entry in value]
        if isinstance(value, str):
            encodable = re.sub("[\ud800-\udfff]", "\ufffd", value)
            return self._starts.sub(self._cut, encodable)
        return value

    def _cut(self, start: re.Match[str]) -> str:
        """What may be the first character of a special token, cut off if it is."""
        place, text = start.start(), start.string
        # Not in one regular expression: re would try a thousand tokens one after the other.
        found = any(text[place : place + length] in self._special for length in self._lengths)
        return start[0] + self.CUT if found else start[0]


def character_count() -> Callable[[str], str]:
    """A function that returns its text, and raises ApiError when all its texts have more characters
    than a prompt may have.
    """
    left = PROMPT_CHARACTERS

    def count(text: str) -> str:
        nonlocal left
        left -= len(text)
        if left < 0:
            problem = f"the prompt has more than {PROMPT_CHARACTERS} characters: send less"
            raise ApiError(400, problem, "messages")
        return text

    return count


def single_calls(message: Message) -> list[Message]:
    """A message for each of its calls; the message itself if it has none."""
    return [{**message, "tool_calls": [call]} for call in message.get("tool_calls", ())] or [
        message
    ]


class Tokenizer:
    """Messages and text to token ids, and back, for both vocabularies."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: str = "",
        size: int = LLAMA3_VOCABULARY,
        stop_tokens: Iterable[int] = (),
        **names: str,
    ) -> None:
        """`size` is how many token ids the model has, and `names` are bos_token and its like.

        Raises UserError.
        """
        self.size = size
        self.vocabulary = vocabulary
        self.template = ChatTemplate(template, vocabulary.special, **names)
        self.stop_tokens = frozenset(stop_tokens)
        if (end := vocabulary.added.get(names.get("eos_token", ""))) is not None:
            self.stop_tokens |= {end}
        self.thinks = "enable_thinking" in template
        self.think_tags = next(
            (tags for tags in THINK_TAGS if tags[0] in vocabulary.added), THINK_TAGS[-1]
        )
        hidden = vocabulary.special - SHOWN
        self._hidden = frozenset(vocabulary.added[token] for token in hidden)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        thinking: bool = False,
        starts: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, with the start of the assistant's answer if it `starts`.

        Raises ApiError.
        """
        options = {"enable_thinking": thinking, "add_generation_prompt": starts}
        return self.vocabulary.encode(self.template.render(messages, tools, **options))

    def encode_document(self, text: str) -> list[int]:
        """Token ids of plain text at the start of a document."""
        return [*self.vocabulary.start, *self.encode_text(text)]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, whatever special tokens it spells."""
        return self.vocabulary.encode(self.template.inert(text).split(ChatTemplate.CUT))

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The UTF-8 of the tokens, which may end inside a character.

        Most special tokens have no text.
        """
        return b"".join(
            self.vocabulary.spell(token) for token in tokens if token not in self._hidden
        )

    def token_bytes(self) -> tuple[list[bytes], list[int]]:
        """Every token's bytes, with b"\\xff" before a special one's, and the tokens that end an
        answer: for llguidance.
        """
        spelled = [self.vocabulary.spell(token) for token in range(self.vocabulary.size)]
        for text in self.vocabulary.special:
            spelled[self.vocabulary.added[text]] = b"\xff" + text.encode()
        return spelled, sorted(token for token in self.stop_tokens if token < len(spelled))

    def check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """Raise ApiError for a token id that the model does not have."""
        if (highest := max(tokens, default=0)) >= self.size:
            raise ApiError(
                400, f"{param} has the token id {highest}: ids end at {self.size - 1}", param
            )


def read_template(folder: Path, settings: Mapping[str, Any]) -> str:
    """A checkpoint's chat template; "" if it has none.

    `settings` is the content of its tokenizer_config.json.
    """
    template = settings.get("chat_template")
    named = {"default": template}
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
    files = [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]
    for path in filter(Path.is_file, files):
        try:
            named[path.stem] = path.read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): download it again") from error
    default = named.get("chat_template") or named.get("default") or ""
    if "tool_use" in named:
        return f"{{% if tools %}}{named['tool_use']}{{% else %}}{default}{{% endif %}}"
    return str(default)


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.json with its chat template; or Llama 3's tokenizer.model, for
    Meta's layout.
    """
    folder, config = checkpoint.hf_folder or checkpoint.folder, checkpoint.config
    settings = read_json(folder / "tokenizer_config.json")
    names: dict[str, str] = {}
    for name, token in [*read_json(folder / "special_tokens_map.json").items(), *settings.items()]:
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str) and text:
            names[name] = text
    template = read_template(folder, settings)
    ends = checkpoint.stop_tokens
    if (folder / "tokenizer.json").is_file():
        vocabulary: Vocabulary = FileVocabulary(folder / "tokenizer.json")
    else:
        if config.vocab_size != LLAMA3_VOCABULARY:
            raise UserError(
                f"{folder} has no tokenizer.json: name the model's folder in Hugging Face's layout"
            )
        beside = (checkpoint.folder / "tokenizer.model", folder / "original" / "tokenizer.model")
        vocabulary = Llama3Vocabulary(next(filter(Path.is_file, beside), None))
        ends |= {
            vocabulary.added[token] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        }
        template = template or LLAMA_TEMPLATE
    return Tokenizer(vocabulary, template, config.vocab_size, ends, **names)


# ==================================================================================================
# Answers
# ==================================================================================================


class Token(NamedTuple):
    """A token with what belongs to it."""

    id: int
    logprob: float | None = None
    # the most likely tokens in its place, with their log-probabilities
    likely: Sequence[tuple[int, float]] = ()


class Piece(NamedTuple):
    """A piece of an answer.

    A call is a piece "call", its function's name, and then pieces of its arguments.
    """

    kind: Literal["thinking", "text", "call", "arguments", "end"]
    text: str  # of "end": the finish reason
    tokens: Sequence[Token]  # since the last piece


@dataclass
class Call:
    """A function that the model wants called."""

    name: str
    arguments: str = ""  # JSON
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:9])  # as Mistral's templates want it


class Reader:
    """Reads an answer's tokens, and tells text, thinking and tool calls apart.

    It gives out what is certain, and holds back what may still change: half a character, and what
    may be the start of a stop string, a tag or a call. Calls have the forms of Llama 3, Qwen,
    Hermes and Mistral models: a JSON object, or one of a list, after a mark or at the start of the
    answer; or [TOOL_CALLS]name[ARGS]{...}. A call of an unknown function is text.
    """

    MARK = re.compile("|".join(map(re.escape, CALL_MARKS)))
    BEFORE = re.compile(rf"(?:\s|{MARK.pattern})*")  # a call
    # A call up to its arguments, as JSON and as Mistral's newer models write it, and what may become
    # that; and JSON that may be a call in another form, for its first key.
    JSON_CALL = re.compile(
        r'\[?\s*\{\s*(?:"(?:type|id)"\s*:\s*"[^"]*"\s*,\s*)*"name"\s*:\s*"([^"]*)"\s*,\s*'
        r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
    )
    JSON_START = re.compile(r'\[?\s*(?:\{\s*(?:"\w*)?)?\Z')
    LIKE_CALL = re.compile(r'\[?\s*\{\s*"(?:name|type|id|function|arguments|parameters)"')
    NAMED_CALL = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\]\s*(?=\{)")
    NAMED_START = re.compile(r"[\w.-]*(?:\[[\w\]]*)*\s*\Z")
    # What stands after a call's arguments: members of the object around them, of which the last may
    # only have begun, brackets, and what parts it from the next call.
    AFTER = re.compile(
        r'(?:\s*,\s*"\w+"\s*:\s*(?:"[^"]*"|[\w.+-]+))*'
        r'(?:\s*,\s*(?:"\w*(?:"\s*(?::\s*(?:"[^"]*)?)?)?)?\Z|(?:[\s;,\]}]|</tool_call>)*)'
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        state: str = "text",
        functions: Sequence[str] = (),
        several: bool = True,
        marked: bool = False,
        chat: bool = True,
    ) -> None:
        """`stop` are strings that end the answer. `state` is "opening" if thinking may come,
        "thinking" if the prompt has begun it, else "text".

        `functions` are the names that may be called; if there are none, all is text. Without
        `several` the answer ends with the first call. With `marked` a call begins with a mark, and
        other JSON is text.
        """
        # finish: the reason, once the answer is complete
        self.thinking = self.text = self.finish = ""
        self.calls: list[Call] = []
        self.count = 0  # tokens of the answer
        self.stopped = ""  # the stop string that has come; the text ends before it
        # ended by that, or by the one call that may come: what follows is not read
        self.done = False
        self._tokenizer = tokenizer
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stop = stop
        self._state = state
        self._open, self._close = tokenizer.think_tags
        self._functions = functions
        self._several = several
        # whether the answer may end before the model ends it
        self.may_end = bool(stop or (functions and not several))
        self._bare = not marked  # so a call may begin without a mark
        self._depth = 0  # of the brackets in its arguments
        self._quoted = self._escaped = False  # inside a string there, and after a backslash
        self._held = ""  # text that may still change
        # SentencePiece puts a space before a text, and so before a chat answer.
        self._first = " " if tokenizer.vocabulary.adds_space and chat else ""
        self._untold: list[Token] = []  # since the last piece

    def push_prompt(self, token: Token) -> None:
        """Tell a token of the prompt with the next piece."""
        self._untold.append(token)

    def push(self, token: Token) -> list[Piece]:
        """Read the next token."""
        if self.done:
            return []
        self.count += 1
        self._untold.append(token)
        return self._read(self._decode(self._tokenizer.decode([token.id])))

    def end(self, outcome: str, last: Token | None = None) -> list[Piece]:
        """Give out all that is left. `last` is a stop token whose log-probability is to be told."""
        pieces = [] if self.done else self._read(self._decode(b"", True), final=True)
        if last and not self.done:
            self._untold.append(last)
        self.finish = "stop" if self.done else outcome
        return [*pieces, self._piece("end", self.finish)]

    def _piece(self, kind: Any, text: str) -> Piece:
        tokens, self._untold = self._untold, []
        return Piece(kind, text, tokens)

    def _read(self, text: str, final: bool = False) -> list[Piece]:
        """Add text to what is held, and take from it what is certain."""
        if text and self._first:
            text, self._first = text.removeprefix(self._first), ""
        text = self._held + text
        ends = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if ends:
            end, self.stopped = min(ends)
            text, final, self.done = text[:end], True, True
        text, may_stop = without_start(text, self._stop, final)
        pieces: list[Piece] = []
        while True:
            before = self._state, text
            kind, said, text = getattr(self, f"_in_{self._state}")(text, final)
            if said:
                pieces.append(self._say(kind, said))
            if before == (self._state, text):
                break
        self._held = text + may_stop
        return pieces

    def _say(self, kind: Any, text: str) -> Piece:
        """A piece of the answer, which also becomes part of the whole."""
        if kind == "thinking":
            self.thinking += text
        elif kind == "text":
            self.text += text
            self._bare = self._bare and not text.strip()
        elif kind == "call":
            self.calls.append(Call(text))
        else:
            self.calls[-1].arguments += text
        return self._piece(kind, text)

    # The states. Each returns what is certain, of which kind it is, and the rest of the text.

    def _in_opening(self, text: str, final: bool) -> tuple[str, str, str]:
        """Before the answer: thinking may begin."""
        answer = text.lstrip()
        if answer.startswith(self._open):
            self._state = "thinking"
            return "", "", answer[len(self._open) :]
        if final or not self._open.startswith(answer):
            self._state = "text"
        return "", "", text

    def _in_thinking(self, text: str, final: bool) -> tuple[str, str, str]:
        thought, tag, rest = text.partition(self._close)
        if tag:
            self._state = "thought"
            return "thinking", thought, rest
        return "thinking", *without_start(text, [self._close], final)

    def _in_thought(self, text: str, final: bool) -> tuple[str, str, str]:
        """After the thinking come line feeds, which are not part of the answer."""
        answer = text.lstrip("\n")
        self._state = "text" if answer else "thought"
        return "", "", answer

    def _in_text(self, text: str, final: bool) -> tuple[str, str, str]:
        if not self._functions:
            return "text", text, ""
        if self._bare and text.lstrip()[:1] in ("", "[", "{", "<"):
            self._state = "call"
            return "text", "", text
        if mark := self.MARK.search(text):
            self._state = "call"
            return "text", text[: mark.start()], text[mark.start() :]
        return "text", *without_start(text, CALL_MARKS, final)

    def _in_call(self, text: str, final: bool) -> tuple[str, str, str]:
        """What may be a call, from its mark on."""
        before = self.BEFORE.match(text)
        assert before
        call = text[before.end() :]
        whole, start = self.JSON_CALL, self.JSON_START
        if "[TOOL_CALLS]" in before[0] and call[:1] not in ("", "[", "{"):
            whole, start = self.NAMED_CALL, self.NAMED_START
        begun = whole.match(call)
        if begun and begun[1] in self._functions:
            self._state, self._depth = "arguments", 0
            return "call", begun[1], call[begun.end() :]
        if whole is self.JSON_CALL and self.LIKE_CALL.match(call):
            usual = self._usual_calls(call)
            if usual or (usual is None and not final):
                return "", "", before[0] + usual if usual else text
        elif not (begun or final) and (start.match(call) or starts_mark(call)):
            return "", "", text
        self._state, self._bare = "text", False
        return "text", text[:1], text[1:]

    def _usual_calls(self, text: str) -> str | None:
        """The text with the calls at its start in the usual form; "" if there are none, and None
        while their JSON is not complete.
        """
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError as error:
            # in an open string, or at the end: within a word such as false
            goes_on = error.msg.startswith("Unterminated") or error.pos > len(text) - len("false")
            return None if goes_on else ""
        except RecursionError:
            return ""
        calls = [usual_call(entry) for entry in as_list(value)]
        if any(call.get("name") not in self._functions for call in calls):
            return ""
        return "; ".join(json.dumps(call, ensure_ascii=False) for call in calls) + text[end:]

    def _in_arguments(self, text: str, final: bool) -> tuple[str, str, str]:
        """A call's arguments, which end with the bracket that they begin with."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "[{":
                self._depth += 1
            elif character in "]}":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "called" if self._several else "over"
                    return "arguments", text[: i + 1], text[i + 1 :]
        return "arguments", text, ""

    def _in_called(self, text: str, final: bool) -> tuple[str, str, str]:
        """Between a call's arguments and what follows the call."""
        after = self.AFTER.match(text)
        assert after
        rest = text[after.end() :]
        if not final and starts_mark(rest):
            return "", "", text
        self._state = "call" if rest[:1] in ("[", "{") else "text"
        return "", "", rest

    def _in_over(self, text: str, final: bool) -> tuple[str, str, str]:
        """After the one call that there may be."""
        self.done = True
        return "", "", ""


def usual_call(value: Any) -> dict[str, Any]:
    """A call of a JSON value, its name first; {} if that is none.

    Some models write the arguments first, as Hermes 2 Pro's template has it, or in a string, or
    OpenAI's form.
    """
    value = value if isinstance(value, dict) else {}
    inner = value.get("function")
    value = inner if isinstance(inner, dict) else {"name": inner, **value}
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = from_json(arguments)
    if not isinstance(arguments, dict):
        return {}
    return {"name": value.get("name"), "arguments": arguments}


def starts_mark(text: str) -> bool:
    """Whether more text could make this the mark of a call."""
    return any(mark.startswith(text) for mark in CALL_MARKS)


def without_start(text: str, marks: Sequence[str], final: bool) -> tuple[str, str]:
    """The text without the start of a mark at its end, and that start; if `final`, none follows."""
    starts = (mark[:n] for mark in marks for n in range(1, min(len(mark), len(text) + 1)))
    held = "" if final else max(filter(text.endswith, starts), key=len, default="")
    return text.removesuffix(held), held


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbouring pieces of one kind as one. Two calls stay two: arguments part them."""
    for kind, alike in itertools.groupby(pieces, lambda piece: piece.kind):
        run = list(alike)
        tokens = [token for piece in run for token in piece.tokens]
        yield Piece(kind, "".join(piece.text for piece in run), tokens)


# ==================================================================================================
# Grammars
# ==================================================================================================

# Seconds of the processor's time: to compile at the first try, at the second, and for one mask.
QUICK_SECONDS, SLOW_SECONDS, MASK_SECONDS = 0.5, 5, 2
QUICK_COMPILES, SLOW_COMPILES = 8, 4  # at once
WALL_SECONDS = 60  # for any of these, on a busy machine
GRAMMAR_MEMORY = 256 << 20  # bytes, for one grammar
MASK, REFUSAL, MISFIT, ENDED = b"=", b"!", b"?", b""  # how a child's answers begin

# A rule of a grammar: in Lark; or its name, a JSON schema, and whether what is not supported there is
# refused, instead of left out. No class: children could not unpickle it.
Rule = str | tuple[str, dict[str, Any], bool]


class Grammars:
    """Compiles grammars with llguidance, each in a process of its own.

    llguidance needs gigabytes, minutes or an endless stack for some grammars. A process can be
    limited, and takes nothing else with it when it ends.

    One process, the source, reads the vocabulary once and forks a child for each grammar.
    """

    def __init__(self, tokens: Callable[[], tuple[list[bytes], list[int]]]) -> None:
        """`tokens` returns the bytes of every token and the tokens that end an answer.

        A special token is b"\\xff" and its name; an unused one is b"". If no token ends an answer,
        masks have one place more, which says whether the answer may end.
        """
        self._tokens = tokens
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(QUICK_COMPILES), threading.Semaphore(SLOW_COMPILES)
        self._source: socket.socket | None = None

    def compile(self, rules: Sequence[Rule]) -> Grammar:
        """Compile rules, of which `start` is the whole.

        Raises ApiError if that is not supported, or too large.
        """
        # What takes longer is begun again with more time, in its turn, and behind all else.
        for slow, turns in enumerate(self._turns):
            with turns:
                grammar = Grammar(self._fork())
                grammar.send(0, (rules, slow))
                answer = grammar.answer(0, WALL_SECONDS if slow else 2 * QUICK_SECONDS)
            if answer:
                break
        check_answer(answer or ENDED)
        return grammar

    def _fork(self) -> Connection:
        """A connection to a new child."""
        ours, theirs = multiprocessing.Pipe()
        with theirs, self._lock:
            for _ in range(2):  # the source may have been killed
                self._source = self._source or self._start()
                with contextlib.suppress(OSError):
                    socket.send_fds(self._source, [b"."], [theirs.fileno()])
                    return ours
                self._source = None
        raise ApiError(500, "the process for grammars does not start")

    def _start(self) -> socket.socket:
        """Start the source; returns the connection to it."""
        if not importlib.util.find_spec("llguidance"):
            raise ApiError(400, "the server needs a package for this: pip install llguidance")
        ours, theirs = socket.socketpair()
        # With -c, Python would import from the current folder before all others.
        run = "import sys; file, *sys.path = sys.argv[1:]; import runpy; "
        run += "runpy.run_path(file)['run_grammars']()"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", run, __file__, *sys.path],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # CTRL+C is for the server
            )
        threading.Thread(target=process.wait, name="grammars", daemon=True).start()
        ours.settimeout(WALL_SECONDS)
        with contextlib.suppress(OSError):
            ours.sendall(pickle.dumps(self._tokens()))
            if ours.recv(1):
                return ours
        process.kill()
        raise ApiError(500, "the process for grammars does not start")


class Grammar:
    """A grammar in its process, which ends with this object.

    The process knows an answer by a number, and follows each with a matcher of its own. Number 0
    has no tokens: its mask is that of every answer's start.
    """

    def __init__(self, connection: Connection) -> None:
        self.numbers = itertools.count(1)
        self._connection = connection
        self._told: dict[int, bytes] = {}  # by number: the last that the process has said
        self._awaited: Counter[int] = Counter()  # by number: what it has still to say

    def send(self, number: int, message: Any) -> None:
        """Tell the process, which will say something of this number."""
        self._awaited[number] += 1
        with contextlib.suppress(OSError):  # `answer` says that it has ended
            self._connection.send((number, message))

    def answer(self, number: int, seconds: float) -> bytes | None:
        """The process's newest answer for this number; None if it does not come in time."""
        deadline = time.monotonic() + seconds
        try:
            while self._awaited[number]:
                if not self._connection.poll(max(deadline - time.monotonic(), 0)):
                    return None
                answer = self._connection.recv_bytes()
                answered = int.from_bytes(answer[:4], "little")
                self._told[answered] = answer[4:]
                self._awaited[answered] -= 1
        except (EOFError, OSError):
            return ENDED
        return self._told.get(number, self._told[0])


def check_answer(answer: bytes) -> None:
    """Raise ApiError if a child has ended, or refuses."""
    if answer == ENDED:
        problem = "takes too long, or too much memory: make it simpler"
        raise ApiError(400, f"the schema or grammar {problem}")
    if answer.startswith(REFUSAL):
        reason = printable(answer[1:].decode(errors="replace"))
        raise ApiError(400, f"the schema or grammar is not supported ({reason}): change it")


@functools.cache
def bit_table() -> torch.Tensor:
    """For each byte its bits, lowest first, as eight booleans in one int64."""
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (torch.arange(256, dtype=torch.uint8)[:, None] & bits).ne(0).view(torch.int64).flatten()


def unpack_bits(data: bytes) -> torch.Tensor:
    """Eight booleans for each byte, the lowest bit first."""
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return bit_table().index_select(0, octets.int()).view(torch.bool)


# What follows runs in the source and in its children.


def run_grammars() -> None:
    """The source: build the vocabulary, and fork a child for each connection that comes."""
    from llguidance import LLTokenizer

    server = socket.socket(fileno=0)
    tokens, ends = pickle.load(server.makefile("rb"))
    wrapper: Any = types.SimpleNamespace(  # what LLTokenizer wants to know of a vocabulary
        is_tokenizer_wrapper=True,
        tokens=tokens,
        special_token_ids=(),
        bos_token_id=None,
        eos_token_id=None,
    )
    vocabulary = LLTokenizer(wrapper, eos_token=ends or None)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    gc.freeze()  # children share this memory
    server.send(b".")
    while True:
        _, descriptors, _, _ = socket.recv_fds(server, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            server.close()
            with contextlib.suppress(EOFError, OSError), Connection(descriptors[0]) as connection:
                serve_grammar(vocabulary, connection)
            os._exit(0)
        os.close(descriptors[0])


def serve_grammar(vocabulary: Any, connection: Connection) -> None:
    """A child: compile one grammar and compute its masks, until the connection is closed."""
    number, (rules, slow) = connection.recv()
    confine(slow)
    seconds = SLOW_SECONDS if slow else QUICK_SECONDS
    matchers: dict[int, Any] = {}
    tokens: Sequence[int] = ()
    while True:
        # If it takes longer, the process ends; a thread could not stop llguidance.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if number == 0:
                matchers[0] = compile_rules(vocabulary, rules)
            matcher = matchers.get(number) or matchers[0].deep_copy()
            matchers[number] = matcher
            fits = matcher.try_consume_tokens(tokens) == len(tokens) or matcher.is_error()
            answer = next_mask(matcher) if fits else MISFIT
        except ValueError as error:
            answer = REFUSAL + str(error).encode(errors="replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(number.to_bytes(4, "little") + answer)
        number, tokens = connection.recv()
        seconds = MASK_SECONDS


def confine(slow: int) -> None:
    """Limit what this process can take from others."""
    os.nice(19 if slow else 5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory is short, end this first
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + GRAMMAR_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def next_mask(matcher: Any) -> bytes:
    """The tokens that may come next, a bit for each. Raises ValueError."""
    mask: bytes = matcher.compute_bitmask()
    if problem := matcher.get_error():
        places = r"(at )?\d+\(\d+\): |failed to compile JSON schema: |\n *\d+ \|.*|\^"
        problem = re.sub(places, "", problem.removesuffix("<non-verbose/>"))
        raise ValueError(" ".join(problem.split()))
    return MASK + mask


def compile_rules(vocabulary: Any, rules: Sequence[Rule]) -> Any:
    """A grammar's matcher. Raises ValueError with the reason if it is not supported."""
    with contextlib.suppress(ValueError):
        return new_matcher(vocabulary, "\n".join(map(in_lark, rules)))
    return new_matcher(vocabulary, "\n".join(in_lark(rule, vocabulary) for rule in rules))


def in_lark(rule: Rule, vocabulary: Any = None) -> str:
    """A rule in Lark. With a vocabulary, what is not supported is left out if that is allowed."""
    if isinstance(rule, str):
        return rule
    name, schema, strict = rule
    schema = repair(close(schema), strict)
    if vocabulary and not strict:
        schema = loosen(vocabulary, schema)
    return f"{name}: {json_in_lark(schema, strict)}"


def new_matcher(vocabulary: Any, grammar: str) -> Any:
    """llguidance's matcher for a grammar in Lark. Raises ValueError."""
    from llguidance import LLMatcher, LLParserLimits

    # The model may spell a text with any tokens, not only with those of the tokenizer.
    grammar = f'%llguidance {{"no_forcing": true}}\n{grammar}'
    # The clock and the memory are limited, so llguidance's own limits need not be tight.
    limits = LLParserLimits(
        max_items_in_row=10**6,
        initial_lexer_fuel=10**8,
        step_lexer_fuel=10**8,
        step_max_items=10**7,
        max_lexer_states=10**7,
        max_grammar_size=10**7,
        verbose_errors=False,
    )
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    next_mask(matcher)
    return matcher


# White space as models have learned it. If any were allowed, weak models would write it without
# end. Without "u" among the escapes, the name of a property has one spelling.
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
FORMATS = (  # that llguidance knows; others are annotations
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "time",
    "uri",
    "uuid",
)
NOT_RULES = ("$id", "id", "$schema", "x-guidance", "title", "description", "default", "examples")
# The keywords whose value is a schema or a list of schemas, and those whose values are schemas.
SCHEMAS = {"items", "additionalItems", "additionalProperties"}
SCHEMAS |= {"allOf", "anyOf", "oneOf", "prefixItems"}
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# Upper bounds are negated where they are compared, so that all are lower bounds.
JSON_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
EXACT = 2**53  # llguidance computes with floats


def json_in_lark(schema: dict[str, Any], strict: bool) -> str:
    """A schema in Lark."""
    return "%json " + json.dumps({**schema, "x-guidance": {**JSON_STYLE, "lenient": not strict}})


def close(schema: dict[str, Any]) -> dict[str, Any]:
    """Allow only the properties listed, unless the schema says more: weak models invent some."""
    others = {"additionalProperties", "allOf", "anyOf", "oneOf", "$ref"}  # these may add some
    if not isinstance(schema.get("properties"), dict) or schema.keys() & others:
        return schema
    properties = dict(schema["properties"])
    for name in as_list(schema.get("required")):
        if isinstance(name, str):
            properties.setdefault(name, True)
    return {**schema, "properties": properties, "additionalProperties": False}


def map_schemas(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The schema with `change` applied to each schema that is directly in it."""
    result = {}
    for name, value in schema.items():
        if name in SCHEMA_MAPS and isinstance(value, dict):
            value = {key: change(entry) for key, entry in value.items()}
        elif name in SCHEMAS:
            value = [*map(change, value)] if isinstance(value, list) else change(value)
        result[name] = value
    return result


def repair(schema: Any, strict: bool) -> Any:
    """Remove what is no rule, and rewrite the rules that llguidance does not keep to.

    What cannot be rewritten is left out; with `strict` it raises ValueError.
    """
    if not isinstance(schema, dict):
        return schema
    schema = map_schemas(schema, lambda entry: repair(entry, strict))
    for name in NOT_RULES:
        schema.pop(name, None)
    if schema.get("format") not in FORMATS:
        schema.pop("format", None)
    if schema.get("propertyNames") == {"type": "string"}:
        del schema["propertyNames"]
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    wrong = [name for name in ("const", "enum") if not exact(schema.get(name))]
    for name, side in JSON_BOUNDS.items():
        if type(given := schema.get(name)) in (int, float):
            bound = max(side * given, -EXACT)
            exclusive = name.startswith("exclusive")
            if bound > EXACT or (exclusive and bound == EXACT):
                wrong.append(name)
            if exclusive and bound >= 0:
                bound += 1e-9  # llguidance takes some bounds for included, if they are whole
            schema[name] = side * bound
    least, required = schema.get("minProperties"), as_list(schema.get("required", []))
    if isinstance(least, int) and len(required) + 1 < least:
        wrong.append("minProperties")  # names that are not listed may come twice
    if strict and wrong:
        raise ValueError(f"{wrong[0]} cannot be enforced exactly")
    for name in wrong:
        del schema[name]
    return schema


def exact(value: Any) -> bool:
    """Whether llguidance reads all numbers in a JSON value exactly."""
    if isinstance(value, float):
        return value == float(f"{value:.15g}")
    if isinstance(value, int):
        return abs(value) <= EXACT
    return all(map(exact, entries(value)))


@functools.cache
def compiles(vocabulary: Any, grammar: str) -> bool:
    """Whether llguidance takes a grammar in Lark."""
    with contextlib.suppress(ValueError):
        new_matcher(vocabulary, grammar)
        return True
    return False


def loosen(vocabulary: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keywords that are not supported."""

    def works(schema: dict[str, Any]) -> bool:
        return compiles(vocabulary, f"start: {json_in_lark(schema, strict=False)}")

    def prune(schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema is not False
        shallow = map_schemas(schema, lambda inner: inner is not False)
        shallow.pop("$ref", None)
        kept = shallow if works(shallow) else {}
        for name, value in shallow.items():
            if works({**kept, name: value}):
                kept[name] = value
        names = kept.keys() | {"$ref"}
        return map_schemas({n: v for n, v in schema.items() if n in names}, prune)

    if works(root):
        return root
    pruned: dict[str, Any] = prune(root)
    if works(pruned):
        return pruned
    return {"type": "object"} if root.get("type") == "object" else {}


class CallForm(NamedTuple):
    """How a family of models writes tool calls."""

    mark: str  # the special token at the start
    arguments: str  # their name in JSON; "" for name[ARGS]{...}
    calls: str  # the rule in Lark for one or more, each a `call`, a name with its arguments


HERMES_CALLS = CallForm(  # and Qwen
    mark="<tool_call>",
    arguments="arguments",
    # Some models write the line feed last, too, and would have to go on with a call.
    calls=r'(mark "\n" call "\n" close "\n"?)+',
)
MISTRAL_CALLS = CallForm(
    mark="[TOOL_CALLS]",
    arguments="arguments",
    calls='mark " "? "[" call (", " call)* "]"',
)
NAMED_CALLS = CallForm(  # Mistral's newer models, such as Devstral
    mark="[TOOL_CALLS]",
    arguments="",
    calls="(mark call)+",
)
LLAMA_CALLS = CallForm(
    mark="<|python_tag|>",
    arguments="parameters",
    calls="mark? call",
)


class Function(NamedTuple):
    """A function that the model may call."""

    name: str
    parameters: dict[str, Any]  # a JSON schema
    strict: bool  # so a schema that the grammar cannot follow is refused


class Form(NamedTuple):
    """What the answer must be."""

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any
    strict: bool = True


def resembles_call(form: Form | None) -> bool:
    """Whether an answer of this form could begin as a call without its mark does, with {"name"."""
    if form is None or form.kind != "json":
        return form is not None
    schema = close(form.value)
    properties = schema.get("properties")
    if not isinstance(properties, dict) or schema.get("additionalProperties") is not False:
        return True
    return "name" in properties


def call_form(template: str) -> CallForm:
    """The form that a model's chat template teaches."""
    if "[TOOL_CALLS]" in template:
        return NAMED_CALLS if "[ARGS]" in template else MISTRAL_CALLS
    return HERMES_CALLS if HERMES_CALLS.mark in template else LLAMA_CALLS


def token_rule(tokenizer: Tokenizer, text: str) -> str:
    """A special token in Lark, or its text if the model has no such token."""
    token = tokenizer.vocabulary.added.get(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def call_rules(
    tokenizer: Tokenizer, form: CallForm, functions: Sequence[Function], marked: bool
) -> list[Rule]:
    """The rule `calls` for calls of these functions.

    With `marked`, it begins with the mark, as no other text does.
    """
    calls: list[str] = []
    rules: list[Rule] = []
    for i, function in enumerate(functions):
        name = json.dumps(function.name, ensure_ascii=False)
        if form.arguments:
            # In the pieces that JSON has: llguidance could not tell one long text from an answer
            # in JSON that begins with the same bracket.
            pieces = ["{", '"name"', ": ", name, ", ", f'"{form.arguments}"', ": "]
            calls.append(f'{" ".join(map(json.dumps, pieces))} arguments{i} "}}"')
        else:
            calls.append(f"{name} {token_rule(tokenizer, '[ARGS]')} arguments{i}")
        parameters = {**function.parameters, "type": "object"}
        rules.append((f"arguments{i}", parameters, function.strict))
    return [
        f"calls: {form.calls.replace('mark?', 'mark') if marked else form.calls}",
        f"mark: {token_rule(tokenizer, form.mark)}",
        f"close: {token_rule(tokenizer, '</tool_call>')}",
        f"call: {' | '.join(calls)}",
        *rules,
    ]


def form_rules(form: Form) -> list[Rule]:
    """The rule `answer` for an answer of this form."""
    if form.kind == "json":
        return [("answer", form.value, form.strict)]
    if form.kind == "choice":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in form.value)
        return ["answer: CHOICE", f"CHOICE: {choices}"]  # one terminal: rules have a limit
    if form.kind == "regex":
        # \/ stays as it is
        escaped = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", form.value)
        return [f"answer: /{escaped}/"]
    return [f"answer: %lark {{\n{form.value}\n}}"]


class Constraint:
    """A grammar for an answer's tokens, from the start or from a tool call on."""

    PATIENCE = 0.05  # seconds that a step waits for a mask, from the token before it

    def __init__(
        self, grammar: Grammar, tokenizer: Tokenizer, trigger: str = "", after: int | None = None
    ) -> None:
        """`trigger` is the text with which a tool call begins; "" if the grammar holds from the
        start.

        It is looked for after the token `after`, if that is given.
        """
        self.active = not trigger
        self._grammar = grammar
        self._number = next(grammar.numbers)
        self._decode = tokenizer.decode
        self._size = tokenizer.vocabulary.size
        self._trigger = trigger.encode()
        self._anywhere = trigger in CALL_MARKS  # else only at the start of the answer
        self._after = after
        self._tokens: list[int] = []  # may be the start of a tool call
        self._pushed = time.monotonic()

    def push(self, token: int) -> None:
        """Follow the answer's next token."""
        if self.active:
            self._send([token])
        elif token == self._after:
            self._after = None
        elif self._trigger and self._after is None:
            self._look_for_trigger(token)

    def _send(self, tokens: list[int]) -> None:
        """Have the child follow tokens. It computes the mask meanwhile."""
        self._pushed = time.monotonic()
        self._grammar.send(self._number, tokens)

    def _look_for_trigger(self, token: int) -> None:
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not self._anywhere:
            text = text.removeprefix(LLAMA_CALLS.mark.encode())
        if text.startswith(self._trigger):
            self.active = True
            self._send(self._tokens)
        elif not text.strip():
            self._tokens = []  # as after a thought
        elif not self._trigger.startswith(text):
            self._tokens = []
            self._trigger = self._trigger if self._anywhere else b""

    @property
    def ready(self) -> bool:
        """Whether `allowed` needs not wait."""
        return self._grammar.answer(self._number, 0) is not None

    def allowed(self) -> torch.Tensor | None:
        """Which tokens [vocabulary] may come next; None if that is not known in time.

        Raises ApiError.
        """
        patience = self._pushed + self.PATIENCE - time.monotonic()
        answer = self._grammar.answer(self._number, patience)
        if answer is None:
            return None
        check_answer(answer)
        if answer == MISFIT:
            if not self._trigger:
                raise ApiError(400, "the schema or grammar has too many cases: make it simpler")
            self.active, self._trigger = False, b""  # its last token went on as no call does
            return None
        return unpack_bits(answer[1:])[: self._size]  # without the place for the end


def constrain(
    tokenizer: Tokenizer,
    grammars: Grammars,
    functions: Sequence[Function],
    form: Form | None,
    forced: bool,
    state: str,
) -> Callable[[], Constraint] | None:
    """Makes the Constraint of each answer: calls if they are `forced`; else calls, or what `form`
    says.

    None: nothing rules it.

    `state` is the Reader's at the start. Raises ApiError.
    """
    if not (form or functions):
        return None
    form = None if forced else form
    family = call_form(tokenizer.template.source)
    rules = call_rules(tokenizer, family, functions, resembles_call(form)) if functions else []
    if not form and not forced:  # text that may become a call
        after = None if state == "text" else tokenizer.vocabulary.added.get(tokenizer.think_tags[1])
        try:
            grammar = grammars.compile(["start: calls", *rules])
        except ApiError:
            if any(function.strict for function in functions):
                raise
            return None  # the calls are then as good as the model
        trigger = '{"name": "' if family is LLAMA_CALLS else family.mark
        return functools.partial(Constraint, grammar, tokenizer, trigger, after)
    start = "calls"
    if form:
        rules += form_rules(form)
        start = "answer | calls" if functions else "answer"
    thinking = 'text over "\\n\\n"?'
    think = {"thinking": thinking, "opening": f"begin {thinking}"}.get(state, "")
    opening, closing = tokenizer.think_tags
    rules += [
        f"begin: {token_rule(tokenizer, opening)}",
        f"over: {token_rule(tokenizer, closing)}",
        "text: /(?s:.*)/",
    ]
    grammar = grammars.compile([f"start: {think} ({start})", *rules])
    return functools.partial(Constraint, grammar, tokenizer)


# ==================================================================================================
# Sampling
# ==================================================================================================

END = -1  # an id that no token has: the end of an answer, where a model has no token for it
CARD_TOP_K = 32  # a card draws from that many tokens at most


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn.

    The definitions and their order are those of vllm/v1/sample/sampler.py.
    """

    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 1.0  # sample from the most likely tokens that together have this probability
    top_k: int = 0  # sample from the k most likely tokens; 0: no limit
    min_p: float = 0.0  # least probability of a token, as a share of the most likely one's
    seed: int | None = None  # None: random
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id: added to its logit
    min_tokens: int = 0  # tokens before a stop token may come
    # divides the positive logits of the tokens so far, and multiplies negative ones
    repetition_penalty: float = 1.0
    # taken from a token's logit for each time that it is in the answer
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0  # taken from its logit once
    # how many of the most likely tokens to report; None: not even the drawn one
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether only the most likely token can come.

        A temperature near 0 counts as 0: dividing by it overflows.
        """
        return self.temperature < 1e-5 or self.top_k == 1 or self.top_p == 0


class Sampler:
    """Draws the tokens of one answer: what is asked for, and what changes while the answer
    grows.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        stop_tokens: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        # Temperature, top_p and a small top_k are all that is asked for, which a card can do.
        plain = params == SamplingParams(params.temperature, params.top_p, params.top_k)
        self._plain = plain and (params.greedy or params.top_k <= CARD_TOP_K)
        self.error = ""  # why the grammar cannot be followed any further
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._penalises = penalties != (1, 0, 0)
        # the position from which on a stop token may come
        self._first_end = len(prompt) + params.min_tokens
        ends = [token for token in stop_tokens if token != END] if params.min_tokens else []
        self._stop_tokens = torch.tensor(ends, dtype=torch.int64)
        # token ids, and what is added to their logits
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._prompt = prompt
        self._new: list[int] = []  # tokens of the answer that are not in the counts yet
        # [vocabulary]: how often each token is in the answer, for penalties
        self._counts: torch.Tensor | None = None

    @property
    def on_host(self) -> bool:
        """Whether the next token must be drawn here, and not on a card.

        A seed too: so it gives the same text whatever else runs.
        """
        return not self._plain or (self.constraint is not None and self.constraint.active)

    @property
    def ready(self) -> bool:
        """Whether `draw` needs not wait for the grammar."""
        return self.constraint is None or self.constraint.ready

    def push(self, token: int) -> None:
        """Follow the answer's next token, drawn here or not."""
        if self._penalises:
            self._new.append(token)
        if self.constraint:
            self.constraint.push(token)

    def draw(self, logits: torch.Tensor, position: int) -> Token | None:
        """The next token, from logits [vocabulary].

        None: the grammar does not know yet what may come, or has failed.

        The draw depends on the seed and the position alone. Raises ArithmeticError for a NaN.
        """
        allowed, constraint = None, self.constraint
        if constraint and constraint.active:
            try:
                allowed = constraint.allowed()
            except ApiError as error:
                self.error = str(error)
                return None
            if constraint.active and allowed is None:  # it may have found that it rules no more
                return None
        changed = self._penalised(logits.float(), position)
        if allowed is not None:
            # A model's vocabulary may be padded. masked_fill would take ten times as long.
            known = F.pad(allowed.view(torch.uint8), (0, len(changed) - len(allowed))).float()
            changed = changed.add(known.sub_(1), alpha=1e38)
            if changed.amax() < -1e37:
                return Token(END)
        token = draw(changed, self.params, position)
        if self.params.logprobs is None:
            return Token(token)
        return scored(logits, token, self.params.logprobs)

    def _penalised(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """The logits with biases and penalties, in float32."""
        params = self.params
        if params.logit_bias:
            logits = logits.index_add(0, self._biased, self._biases)
        if position < self._first_end:
            # not minus infinity: they may be all tokens
            logits = logits.index_fill(0, self._stop_tokens, -1e30)
        if not self._penalises:
            return logits
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
            self._seen = torch.tensor(self._prompt, dtype=torch.int64)
        new = torch.tensor(self._new, dtype=torch.int64)
        self._new.clear()
        self._counts.index_add_(0, new, torch.ones(len(new)))
        self._seen = torch.cat([self._seen, new])
        seen, counts = logits[self._seen], self._counts[self._seen]
        factor = torch.where(seen > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        seen = seen * factor - params.frequency_penalty * counts
        seen -= params.presence_penalty * counts.clamp(max=1)
        return logits.index_copy(0, self._seen, seen)  # a token's places have one value


BLOCK = 64  # tokens; what is sought over a vocabulary is sought over its blocks, then in a few


def in_blocks(values: torch.Tensor, rest: float) -> torch.Tensor:
    """Values [n] as [blocks, BLOCK], the last one filled up with `rest`."""
    if len(values) % BLOCK:
        values = F.pad(values, (0, -len(values) % BLOCK), value=rest)
    return values.view(-1, BLOCK)


def largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of float32 values [n], largest first, and where they stand.

    They are in the blocks whose own largest values are the largest.
    """
    blocks = in_blocks(values, -math.inf)
    best = blocks.amax(1).topk(min(count, len(blocks))).indices
    top = blocks[best].flatten().topk(count)
    return top.values, best[top.indices // BLOCK] * BLOCK + top.indices % BLOCK


def draw(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The next token, from logits [vocabulary] of any float type, without sorting them.

    A token belongs to the nucleus (Holtzman et al. 2020) if the tokens more likely than it have
    less than top_p of the probability. So draw from all tokens. If the drawn one is outside, draw
    again from the more likely ones: the nucleus is among them.
    """
    logits = logits.float()
    best = float(logits.amax())
    if not math.isfinite(best):  # a NaN or an infinity counts as the largest
        raise ArithmeticError("the logits are not finite numbers")
    if params.greedy:
        return int(largest(logits, 1)[1])
    tokens = None
    if 0 < params.top_k < len(logits):
        logits, tokens = largest(logits, params.top_k)
    # exp takes a hundred times as long where it underflows, and 1e-35 is as good as 0
    weights = logits.sub(best).mul_(1 / params.temperature).clamp_(min=-80).exp_()
    if params.min_p:  # the most likely token weighs 1; F.threshold drops what is equal
        torch.threshold_(weights, params.min_p * (1 - 1e-6), 0.0)
    chance = random if params.seed is None else random.Random(f"{params.seed} {position}")
    blocks = in_blocks(weights, 0.0)
    sums = blocks.sum(1)
    total = float(sums.sum())
    while True:
        block = pick(sums, chance.random())
        place = pick(blocks[block], chance.random())
        # the more likely ones
        sums = torch.threshold_(blocks, float(blocks[block, place]), 0.0).sum(1)
        if float(sums.sum()) < params.top_p * total:
            drawn = block * BLOCK + place
            return drawn if tokens is None else int(tokens[drawn])


def pick(weights: torch.Tensor, chance: float) -> int:
    """Where a weight stands that is drawn in proportion, by a number from 0 up to 1."""
    sums = weights.cumsum(0)
    # More than 0, so no weight of 0 is found.
    return int(torch.searchsorted(sums, (1 - chance) * float(sums[-1])))


def scored(logits: torch.Tensor, token: int, likely: int) -> Token:
    """A token drawn from logits [vocabulary], with its log-probability.

    `likely`: how many of the most likely tokens to report with it.
    """
    logits = logits.float()
    total = logits.logsumexp(0)
    values, tokens = largest(logits, likely)
    # Tuples of numbers cost the garbage collector nothing; lists would.
    others = tuple(zip(tokens.tolist(), (values - total).tolist()))
    return Token(token, float(logits[token] - total), others)


# ==================================================================================================
# Engine
# ==================================================================================================


class Scores(NamedTuple):
    """The log-probabilities that are wanted of a prompt's tokens."""

    tokens: Sequence[int]  # those that follow the work's tokens; none may follow the last
    likely: int  # how many of the most likely tokens to report with each


class Work(NamedTuple):
    """One slot's input for one step: a piece of its prompt, or the last token of its answer."""

    slot: int
    tokens: Sequence[int]  # at the positions position, position + 1, ...
    position: int  # how many tokens the slot holds already
    sampler: Sampler | None  # None: more of the prompt follows, no next token is wanted
    scores: Scores = Scores((), 0)


class Result(NamedTuple):
    """What a step gives for one Work."""

    token: Token | None = None  # None: none was wanted, or the sampler could not draw one yet
    scores: Sequence[Token] = ()  # of Work.scores


class Engine(Protocol):
    """Tokens in, tokens out. An engine knows nothing of HTTP, text or requests.

    One thread, the scheduler's, makes every call but `used`.
    """

    device: str  # "n150", "t3k", "cpu" ...
    max_batch_size: int  # slots that run in one step
    max_seq_len: int  # tokens that a slot can hold, prompt and answer
    kv_cache_tokens: int  # that all slots together can hold
    # The slots are divided equally, in order, among so many pools of KV cache.
    kv_pools: int
    # Prompt tokens that a step may prefill. A prompt may then be prefilled in pieces, and go on
    # from the tokens that an earlier request left in its slot. 0: prompts are prefilled whole, from
    # the start.
    prompt_chunk: int
    resume_align: int  # a prompt goes on at a multiple of this; fewer tokens take as long
    scores_prompts: bool  # so Work.scores is supported
    sampling: str  # where tokens are drawn, and why

    def reserve(self, slot: int, length: int) -> bool:
        """Make the slot's room `length` tokens, also while it runs. False, and nothing changed,
        while its pool has no more.

        What the slot holds beyond its new room is lost. A slot that alone keeps room in its pool
        can always have max_seq_len.
        """

    def copy(self, source: int, slot: int, length: int) -> None:
        """Let a slot hold the first `length` positions that another slot of its pool holds.

        It gets room for them if it has less. `length` is a multiple of resume_align. A card shares
        the memory: no slot writes what it shares without giving it back first, by `reserve`. Called
        only if prompts can be prefilled in pieces.
        """

    def used(self, slots: Sequence[int]) -> int:
        """Tokens of KV cache that these slots of one pool take; what they share counts once. Any
        thread may ask.
        """

    def step(
        self, batch: Sequence[Work], meanwhile: Callable[[], None] = lambda: None
    ) -> list[Result]:
        """Read each item's tokens into its slot; return the next token of each, and the scores that
        are wanted.

        `meanwhile` is called at least once: while the device computes, if it does so by itself, or
        before.
        A sampler that cannot draw yet costs only its own item its token: the scheduler sends the
        last token again.
        """

    def close(self) -> None:
        """Give the device back. No call follows."""


def draw_tokens(rows: Iterable[tuple[Work, torch.Tensor]]) -> dict[int, Token | None]:
    """Draw the next token of each slot that wants one, from its logits [vocabulary].

    On one thread: the operations are short, and waiting for other threads at each of them costs
    more than they save, above all on a busy machine. A row's token depends on nothing beside it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            work.slot: work.sampler.draw(logits, work.position + len(work.tokens))
            for work, logits in rows
            if work.sampler
        }
    finally:
        torch.set_num_threads(threads)


# told while a model loads: what goes on, and, where known, how much is done, 0 to 1
Progress = Callable[..., None]


@contextlib.contextmanager
def alone(path: Path, progress: Progress, waiting: str) -> Iterator[None]:
    """Let no other process be in here with this file, which is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:  # closed, and so unlocked, even if this process is killed
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            progress(waiting)
            time.sleep(0.1)
        yield


# ==================================================================================================
# CPU engine
# ==================================================================================================


class Run(NamedTuple):
    """Neighbouring slots with equally many tokens in a step: their attention is one operation."""

    rows: slice  # B * n of the step's rows
    slots: slice  # B
    # [B, 1, G * n, L]: 0 where a row may look, -inf elsewhere. L is how many positions are in use
    # in the longest slot, rounded up.
    mask: torch.Tensor


# the product with a weight [out, in]: rows [T, in] to [T, out]
Linear = Callable[["torch.Tensor"], "torch.Tensor"]
MakeLinear = Callable[["torch.Tensor", "torch.dtype"], Linear]


class Layer(NamedTuple):
    """One transformer block."""

    attention_norm: torch.Tensor
    query_key_value: Linear
    query_key_norm: torch.Tensor | None  # [heads + KV heads, head_dim]
    output: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class TorchEngine:
    """Llama and its relatives in plain PyTorch, for the CPU.

    A step takes all tokens of its batch, prompts and answers, as rows of one matrix [T, dim]: the
    weights are fetched from memory once for all. Only attention looks at slots.

    The KV cache is [slots, positions, KV heads, head_dim] for each layer. It starts as zeros: what
    the mask hides is multiplied by 0, and must not be NaN.
    """

    device = "cpu"
    prompt_chunk = 512  # more are no faster
    resume_align = 1
    scores_prompts = True
    sampling = "on the host"
    # weights; a smaller model is faster on one thread, for threads wait at every operation
    SMALL = 200_000_000

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_batch_size: int,
        max_seq_len: int,
        progress: Progress,
        dtype: str = "auto",
        threads: int = 0,
    ) -> None:
        config = self.config = checkpoint.config
        self.max_batch_size = max_batch_size
        self.kv_cache_tokens, self.kv_pools = max_batch_size * max_seq_len, 1
        self._room = [0] * max_batch_size
        size = sum(math.prod(shape) for _, shape in config.weights().values())
        if threads or size < self.SMALL:
            torch.set_num_threads(threads or 1)
        self._choose_arithmetic(dtype)
        # Return freed buffers to the system while loading, or they fragment the heap.
        keep_freed_memory(1 << 20)
        self._load(checkpoint, progress)
        self._prepare(checkpoint.open_weights(), max_batch_size, max_seq_len)
        keep_freed_memory(32 << 20)

    def _choose_arithmetic(self, dtype: str) -> None:
        """bfloat16 where the processor multiplies it. Elsewhere it is emulated, and slow.

        There: float32 rows, with weights of two bytes where FBGEMM can widen them.
        """
        fast_bfloat16 = False
        with contextlib.suppress(AttributeError):  # as the operators below, not PyTorch's interface
            fast_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.dtype = torch.bfloat16 if fast_bfloat16 else torch.float32
        if dtype != "auto":
            self.dtype = getattr(torch, dtype)
        self._linear: MakeLinear = plain_linear
        if dtype == "auto" and not fast_bfloat16 and multiplies(half_linear, self.dtype):
            self._linear = half_linear
        elif (fast_bfloat16 or self.dtype == torch.float32) and multiplies(
            packed_linear, self.dtype
        ):
            self._linear = packed_linear

    def _prepare(
        self, read: Callable[[str], torch.Tensor], max_batch_size: int, max_seq_len: int
    ) -> None:
        """Take the weights that are in no layer, and make the tables and the KV cache."""
        config, self.max_seq_len = self.config, max_seq_len
        self.norm = read("norm.weight").to(self.dtype, copy=True)
        self.embedding = read("tok_embeddings.weight")  # mapped: only used rows take memory
        self.cos, self.sin = rotary_tables(config, max_seq_len)
        shape = (max_batch_size, max_seq_len, config.n_kv_heads, config.head_dim)
        self.keys = [lazy_zeros(shape, self.dtype) for _ in self.layers]
        self.values = [lazy_zeros(shape, self.dtype) for _ in self.layers]

    def _load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Read the layers, two at a time, and the head: one waits for the disk while the other is
        laid out. More would take more memory.
        """
        count = self.config.n_layers
        pool = concurrent.futures.ThreadPoolExecutor(2)
        try:
            # Mapped anew for each layer: pages that were read stay in memory as long as their
            # mapping.
            layers = pool.map(
                lambda number: self._read_layer(checkpoint.open_weights(), number), range(count)
            )
            self.layers: list[Layer] = []
            for layer in layers:
                progress("loading the weights", len(self.layers) / count)
                self.layers.append(layer)
        finally:  # after a stop, without the layers that are not begun
            pool.shutdown(wait=False, cancel_futures=True)
        self.head = self._linear(checkpoint.open_weights()("output.weight"), self.dtype)

    def _read_layer(self, read: Callable[[str], torch.Tensor], number: int) -> Layer:
        prefix = f"layers.{number}."

        def tensor(name: str) -> torch.Tensor:
            return read(prefix + name).to(self.dtype, copy=True)

        def linear(*names: str) -> Linear:  # several weights become one, stacked
            weight = torch.cat([read(f"{prefix}{name}.weight") for name in names])
            return self._linear(weight, self.dtype)

        query_key_value = linear("attention.wq", "attention.wk", "attention.wv")
        query_key_norm = None
        if self.config.family == "qwen2":
            biases = [tensor(f"attention.{name}.bias") for name in ("wq", "wk", "wv")]
            query_key_value = biased(query_key_value, torch.cat(biases))
        if self.config.family == "qwen3":
            heads = {"q": self.config.n_heads, "k": self.config.n_kv_heads}
            norms = [
                tensor(f"attention.{name}_norm.weight").expand(count, -1)
                for name, count in heads.items()
            ]
            query_key_norm = torch.cat(norms)
        return Layer(
            tensor("attention_norm.weight"),
            query_key_value,
            query_key_norm,
            linear("attention.wo"),
            tensor("ffn_norm.weight"),
            linear("feed_forward.w1", "feed_forward.w3"),
            linear("feed_forward.w2"),
        )

    def step(
        self, batch: Sequence[Work], meanwhile: Callable[[], None] = lambda: None
    ) -> list[Result]:
        meanwhile()
        with torch.inference_mode():
            hidden = self.forward(batch)
            tokens = draw_tokens(self.logits(batch, hidden))
            return [
                Result(tokens.get(work.slot), self._score(rows, work.scores))
                for work, rows in zip(batch, hidden)
            ]

    def logits(
        self, batch: Sequence[Work], hidden: Sequence[torch.Tensor]
    ) -> Iterable[tuple[Work, torch.Tensor]]:
        """The items whose next token is wanted, each with its logits [vocabulary]."""
        drawing = [work for work in batch if work.sampler]
        last = [rows[-1] for work, rows in zip(batch, hidden) if work.sampler]
        return zip(drawing, self.head(torch.stack(last))) if last else ()

    def forward(self, batch: Sequence[Work]) -> Sequence[torch.Tensor]:
        """Run the batch; return each item's hidden states [its tokens, dim], ready for the head."""
        config = self.config
        tokens = torch.tensor([token for work in batch for token in work.tokens])
        slots = torch.tensor([work.slot for work in batch for _ in work.tokens])
        positions = torch.tensor(
            [work.position + i for work in batch for i in range(len(work.tokens))]
        )
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # [T, 1, head_dim / 2]
        runs, kv_heads = self._runs(batch), config.n_kv_heads
        x = self.embedding[tokens].to(self.dtype)  # [T, dim]
        for layer, keys, values in zip(self.layers, self.keys, self.values):
            rows = layer.query_key_value(rms_norm(x, layer.attention_norm, config.norm_eps))
            rows = rows.view(len(tokens), -1, config.head_dim)
            query_key, value = rows[:, :-kv_heads], rows[:, -kv_heads:]
            if layer.query_key_norm is not None:
                query_key = rms_norm(query_key, layer.query_key_norm, config.norm_eps)
            query_key = rotate(query_key, cos, sin)
            query, keys[slots, positions] = query_key[:, :-kv_heads], query_key[:, -kv_heads:]
            values[slots, positions] = value
            x = x + layer.output(
                torch.cat([attend(query[run.rows], keys, values, run) for run in runs])
            )
            gate, up = layer.gate_up(rms_norm(x, layer.ffn_norm, config.norm_eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        x = rms_norm(x, self.norm, config.norm_eps)
        return torch.split(x, [len(work.tokens) for work in batch])

    def _score(self, rows: torch.Tensor, scores: Scores) -> list[Token]:
        """The tokens that follow these rows [n, dim], with their log-probabilities."""
        result: list[Token] = []
        for begin in range(0, len(scores.tokens), 64):  # 64 rows of Llama 3's logits take 33 MB
            tokens = scores.tokens[begin : begin + 64]
            logits = self.head(rows[begin : begin + len(tokens)])
            result += map(scored, logits, tokens, itertools.repeat(scores.likely))
        return result

    def _runs(self, batch: Sequence[Work]) -> list[Run]:
        """Cut the batch into runs: single tokens in neighbouring slots together, each piece of a
        prompt alone.
        """
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
            # oneDNN compiles code for each length, too, and keeps it: see packed_linear.
            length = -(-(max(work.position for work in run) + n) // 64) * 64
            length = min(length, self.max_seq_len)
            rows = [[work.position + i for i in range(n)] * group for work in run]
            hidden = torch.arange(length) > torch.tensor(rows)[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
            slots = slice(run[0].slot, run[0].slot + len(run))
            result.append(Run(slice(row, row + len(run) * n), slots, mask))
            row += len(run) * n
        return result

    def reserve(self, slot: int, length: int) -> bool:
        self._room[slot] = length
        return True

    def copy(self, source: int, slot: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[slot, :length] = cache[source, :length]

    def used(self, slots: Sequence[int]) -> int:
        return sum(self._room[slot] for slot in slots)

    def close(self) -> None:
        """Nothing to do: the memory goes with the process."""


def keep_freed_memory(size: int) -> None:
    """Have glibc keep freed buffers under `size` bytes, 32 MB at most, instead of returning them to
    the system.

    A returned buffer costs a page fault for every 4 KB when it is needed again: a tenth of a step
    of 32 users.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, size)  # M_MMAP_THRESHOLD
        mallopt(-1, 16 * size)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Have glibc return what it keeps of freed buffers to the system."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory page by page, when first written; torch.zeros takes all of it."""
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(*shape)


def multiplies(linear: MakeLinear, dtype: torch.dtype) -> bool:
    """Whether this PyTorch, on this machine, has the operators of a product, as it is called here.

    They are not part of PyTorch's interface: another release may change them.
    """
    weight, rows = torch.eye(32, dtype=dtype), torch.arange(64.0).view(2, 32).to(dtype)
    try:
        return torch.equal(linear(weight, dtype)(rows), rows)
    except (AttributeError, TypeError, RuntimeError):
        return False


def plain_linear(weight: torch.Tensor, dtype: torch.dtype) -> Linear:
    """The product with a weight as it is."""
    return functools.partial(F.linear, weight=weight.to(dtype))


def packed_linear(weight: torch.Tensor, dtype: torch.dtype) -> Linear:
    """The product with a weight in oneDNN's own layout.

    oneDNN compiles code for each number of rows, and keeps it. So large numbers are rounded up:
    there are then fewer of them.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 32)  # the layout for 32 rows

    def product(rows: torch.Tensor) -> torch.Tensor:
        count = len(rows)
        if count > 32:
            rows = F.pad(rows, (0, 0, 0, -count % 16))
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, packed, None, "none", [], ""
        )
        return result[:count]

    return product


def biased(product: Linear, bias: torch.Tensor) -> Linear:
    """The product plus a bias [out]."""
    return lambda rows: product(rows) + bias


def half_linear(weight: torch.Tensor, _: torch.dtype) -> Linear:
    """The product of float32 rows with a weight kept in float16, which FBGEMM widens in registers.

    For x86 processors without bfloat16: float32 weights would take twice the memory, and twice the
    time to read. A bfloat16 weight is a float16 one exactly from 6e-5 to 65504, and to within 3e-8
    below.
    """
    # In parts: FBGEMM takes half as long again to lay out more rows at once.
    packed = [
        torch.ops.quantized.linear_prepack_fp16(part.float(), None)
        for part in torch.split(weight, 4096)
    ]
    return lambda rows: torch.cat(
        [torch.ops.quantized.linear_dynamic_fp16(rows, part) for part in packed], dim=-1
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich 2019, over the last dimension, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary_tables(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [length, head_dim / 2], of the angle by which a position turns each
    pair of a head.

    Su et al. 2021, with the scaling of Llama 3.1: wavelengths longer than the original context are
    stretched by the factor, short ones are kept, and those between are interpolated. Or with that
    of LongRoPE (Ding et al. 2024): each has a factor of its own, for a context up to the original
    one or beyond it, and cosine and sine grow with the context that the model was made for.
    """
    scaling, size = config.rope_scaling or {}, 1.0
    frequency = config.rope_theta ** (
        -torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    )
    if "long_factor" in scaling:
        original = scaling["original_max_position_embeddings"]
        frequency /= torch.tensor(scaling["long_factor" if length > original else "short_factor"])
        size = math.sqrt(1 + math.log(config.max_position / original) / math.log(original))
    elif scaling:
        factor, low, high, original = (scaling[name] for name in ROPES["llama3"])
        turns = original * frequency / (2 * torch.pi)  # in the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return size * angle.cos(), size * angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x [T, heads, head_dim] by the angles [T, 1, head_dim
    / 2].
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: Run) -> torch.Tensor:
    """Attention of the run's rows, query [B * n, heads, head_dim], over its slots' cache; [B * n,
    heads * head_dim].

    The G query heads that share a KV head become G * n queries of that head: no key or value is
    repeated.
    """
    batch, _, _, length = run.mask.shape
    kv_heads, head_dim = keys.shape[2:]
    n = query.shape[0] // batch
    # [B, KV heads, G, n, head_dim]
    query = query.view(batch, n, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    attended = F.scaled_dot_product_attention(
        query.reshape(batch, kv_heads, -1, head_dim),
        keys[run.slots, :length].transpose(1, 2),
        values[run.slots, :length].transpose(1, 2),
        attn_mask=run.mask,
    )
    return (
        attended.view(batch, kv_heads, -1, n, head_dim)
        .permute(0, 3, 1, 2, 4)
        .reshape(batch * n, -1)
    )


# ==================================================================================================
# Card engine
# ==================================================================================================

# The Generator's folder in models/ of a tt-metal checkout, until 2026-09 and since.
GENERATOR_FOLDERS = ("tt_transformers", "ttt_compat")
# Chips by MESH_DEVICE's names, from demo/simple_text_demo.py; where several have as many, the first
# is what they are without that variable. P300x2 is the QuietBox 2.
WORMHOLE_BOARDS = {"N150": 1, "N300": 2, "N150x4": 4, "T3K": 8, "TG": 32}
BLACKHOLE_BOARDS = {
    "P150": 1, "P100": 1, "P300": 2, "P150x4": 4, "P300x2": 4, "P150x8": 8, "BHGLX": 32,
}  # fmt: skip
CHIPS = WORMHOLE_BOARDS | BLACKHOLE_BOARDS
# Bytes of a chip's DRAM for weights and KV cache. On an N150 Llama 3.2 3B runs with 131,072 tokens,
# 11.5 GB, and Llama 3.1 8B runs out of memory with 65,536, 11.7 GB. A P100 has the least of Blackhole.
WORMHOLE_DRAM, BLACKHOLE_DRAM = 11.6e9, 27e9
KV_CACHE_TOKENS = 131_072  # at most
# Bytes of DRAM for traces, at most. If they are too few, warm-up fails. An 8B model
# needed more than 25 MB on N150 (tt-metal #48636), 36 on N300 (tt-inference-server #1839), 54 on
# T3K, 70 on P150 (#4005), 110 on P150x4 (#3436), and a 70B model 93 on P300x2 (#3400), all with
# fewer prompt shapes than are traced here; models/model_trace_region_sizes.yaml gives 70B 224 MB.
TRACE_REGION_SIZE = 256_000_000
# Bytes of a number in what tt-metal keeps: the exponents of 16 numbers take a byte in its bfloat8
# and bfloat4. The others are by Meta's names of weights, by default, with --accuracy, and with that
# for families other than Llama and Mistral.
BFLOAT8 = 1.0625
DEFAULT_BYTES = {"tok_embeddings": 2.0, "w1": 0.5625, "w3": 0.5625}
ACCURATE_BYTES = {"tok_embeddings": 2.0}
WIDE_BYTES = dict.fromkeys(("tok_embeddings", "wq", "wk", "wv", "wo", "cache"), 2.0)
# tt-metal takes a model's precision and the lengths of its prompts from the folder's name. Those of
# the families that are served begin so.
KNOWN_NAMES = ("Llama-3", "DeepSeek-R1", "Mistral-", "Qwen", "QwQ", "Phi-3.5-mini", "Phi-4")
BLOCK_SIZE = 32  # tokens in a block of the paged KV cache
BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # slots that ModelArgs allows; 32 is the height of a tile
# lengths that get_padded_prefill_len pads prompts to; longer ones double
SHORT_PREFILL, LONG_PREFILL = (128, 1024)
PREFILL_ROWS = (8, 4, 1)  # short prompts in one prefill call; 8 are as many tokens as a long one
TROUBLE = {  # a pattern in tt-metal's message when loading fails: what to do
    "trace buffers of size": "the traces do not fit into {region} bytes: give them more with --trace-region-size",
    "max L1 size|L1 buffer": "the card's cores have too little memory for a piece of a prompt: "
    "export MAX_PREFILL_CHUNK_SIZE=1",
    "Out of Memory": "the card is out of memory: --max-batch-size {batch} halves the KV cache",
    "divisible by num_devices|[Uu]nsupported model|only supported on": "tt-metal does not run this "
    "model on {board} ({what}): choose a smaller board with MESH_DEVICE, or add --data-parallel",
    "open device.*ermission denied": "this user may not open the card: sudo chmod a+rw /dev/tenstorrent/*",
    "KMD": "ttnn needs another driver ({what}): install the newest tt-kmd, as tt-installer does",
    "[Ff]irmware|FW version": "ttnn needs other firmware on the card ({what}): install the newest "
    "with tt-flash, as tt-installer does",
    "[Hh]uge ?[Pp]age|[Pp]in pages|[Ss]ysmem|IOMMU": "the card needs hugepages of this machine "
    "({what}): set them up, as tt-installer does, and reboot",
    "physical topology": "the chips are not connected as in {board} ({what}): check the cables, "
    "and see what tt-topology shows",
    r"CHIP_IN_USE|TLB|[Tt]imed? ?out|\b[Hh]ang": "the card{users} does not answer: stop its other "
    "users, tt-smi -r",
    "No chips detected": "ttnn finds no working card that this user may open: see what tt-smi "
    "and ls -l /dev/tenstorrent show, and try tt-smi -r",
    "No module named '(?!models|ttnn)": "tt-metal needs another package ({what}): pip install it",
    r"\[Errno": "a file is in the way ({what}); TT_CACHE_PATH can name another folder for the "
    "weights that tt-metal converts",
}


def card_present() -> bool:
    """Whether this machine has a Tenstorrent card, or ttnn is to mock or simulate one."""
    pretended = ("TT_METAL_MOCK_CLUSTER_DESC_PATH", "TT_METAL_SIMULATOR")
    return any(map(os.environ.get, pretended)) or any(Path("/dev/tenstorrent").glob("*"))


def find_tt_metal() -> tuple[Path, str]:
    """The tt-metal checkout and the Generator's folder in it, which no wheel has.

    Looks in TT_METAL_HOME, PYTHONPATH and the current folder.
    """
    named = os.environ.get("TT_METAL_HOME")
    roots = map(home_path, filter(None, [named, *sys.path, os.getcwd()]))
    for root, folder in itertools.product(roots, GENERATOR_FOLDERS):
        # git may leave an empty folder behind
        if (root / "models" / folder / "tt" / "generator.py").is_file():
            return root, folder
    raise UserError(
        f"a Tenstorrent card is here, but TT_METAL_HOME ({named or 'not set'}) has no "
        f"models/{' or models/'.join(GENERATOR_FOLDERS)}: git clone --depth 1 "
        "https://github.com/tenstorrent/tt-metal ~/tt-metal && export TT_METAL_HOME=~/tt-metal (or use --device cpu)"
    )


def compare_versions(root: Path) -> str:
    """The releases of ttnn and of the checkout, and the cure if they are not known to be the same.

    The checkout's is its nearest tag, such as v0.81.1 or v0.82.0-dev20261104.
    """
    ttnn = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # built from source
        ttnn = importlib.metadata.version("ttnn")
    fails, tag = subprocess.getstatusoutput(f"git -C '{root}' describe --tags --abbrev=0")
    tag = "" if fails else tag.lstrip("v")
    cure = f"git -C {root} checkout v{ttnn}" if ttnn else "build ttnn from it"
    both = f"ttnn is {ttnn or 'built from source'} and {root} is {tag or 'without a tag'}"
    return both if ttnn.split(".")[:2] == tag.split(".")[:2] else f"{both}: {cure}"


def users_of_card() -> str:
    """The other processes that have a card open, according to the driver; "" if there is none."""
    users = set()
    with contextlib.suppress(OSError):  # no driver, or a process that has just ended
        for pids in Path("/proc/driver/tenstorrent").glob("*/pids"):
            for pid in set(pids.read_text().split()) - {str(os.getpid())}:
                users.add(f"{Path('/proc', pid, 'comm').read_text().strip()}, process {pid}")
    return f" ({'; '.join(sorted(users))})" if users else ""


def import_tt(root: Path, folder: str, verbose: bool) -> tuple[Any, ...]:
    """ttnn, and the checkout's modules common, generator and model_config."""
    try:
        if not verbose:  # silence its loggers and progress bars first: ttnn logs during its import
            import loguru
            import tqdm

            loguru.logger.remove()
            loguru.logger.add(sys.stderr, level="ERROR")
            tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
            os.environ |= {"TT_METAL_LOGGER_LEVEL": "error", "TT_LOGGER_LEVEL": "error"}
        import ttnn
    except ImportError as error:
        raise UserError(
            f"a Tenstorrent card is here, but ttnn is not ({error}): pip install ttnn with Python 3.10 or 3.12 (this "
            f"is {sys.version.split()[0]}), or source ~/tt-metal/python_env/bin/activate (or use --device cpu)"
        ) from error
    # The checkout's `models` has no __init__.py, so Python prefers any other package or file of that
    # name, such as a models.py beside this file: bind the name to the folder.
    sys.modules["models"] = models = types.ModuleType("models")
    models.__path__ = [str(root / "models")]
    names = ("common", "generator", "model_config")
    return ttnn, *(importlib.import_module(f"models.{folder}.tt.{name}") for name in names)


@dataclass
class Card:
    """A Tenstorrent board with a model on it: tt-metal's Generator and the KV cache.

    Each of the `copies` of the model has `slots` places in its batch and one pool of blocks of the
    KV cache. Block 0 belongs to no slot: the padding of prompts is written there.
    """

    checkpoint: Checkpoint
    slots: int
    copies: int
    max_seq_len: int
    trace_region_size: int = 0  # bytes; 0: what the board's model needs
    accuracy: bool = False
    verbose: bool = False
    # `open` fills these
    board: str = ""  # by MESH_DEVICE's names
    blocks: int = 1  # of a pool
    padded_seq_len: int = 1  # of a slot
    generator: Any = None
    kv_cache: Any = None
    opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def open(self, progress: Progress) -> None:
        """Open the board and load the model. Raises UserError, or anything, of which `explain`
        makes a sentence.
        """
        if self.slots not in BATCH_SIZES:
            raise UserError(
                f"--max-batch-size is {self.slots}, and must be one of {str(BATCH_SIZES)[1:-1]} "
                "on a card"
            )
        if self.checkpoint.hf_folder is None:
            raise UserError(
                f"tt-metal reads Hugging Face's layout, and {self.checkpoint.folder} has Meta's: hf "
                f"download meta-llama/{self.checkpoint.name} --local-dir ~/models/{self.checkpoint.name}"
            )
        root, folder = find_tt_metal()
        self.versions = compare_versions(root)
        self.ttnn, self.common, self.module, model_config = import_tt(root, folder, self.verbose)
        # ttnn waits silently and forever for a card that another program has.
        progress(
            f"opening the card{users_of_card()}; if it takes a minute, stop other users of it, then tt-smi -r"
        )
        self.board = self._choose_board()
        if self.board == "P100":  # longer pieces can exceed the memory of a core (tt-metal #33991)
            os.environ.setdefault("MAX_PREFILL_CHUNK_SIZE", "2")
        self._divide_pool(self.divide_memory())
        mesh = self._open_mesh()
        progress(f"loading {self.checkpoint.name}")
        precisions = model_config.DecodersPrecision
        precision = precisions.accuracy if self.accuracy else precisions.performance
        os.environ["HF_MODEL"] = str(self.checkpoint.hf_folder)
        if not self.checkpoint.name.startswith(KNOWN_NAMES):
            logger.warning(
                "tt-metal does not know %s and gives it the settings of an unknown model; for those of Llama 3.1 8B, "
                "name its folder Llama-3.1-8B-..., and others likewise",
                self.checkpoint.name,
            )
        with self._converted_weights(progress):
            self._load(mesh, precision)

    def _choose_board(self) -> str:
        """The board to open: MESH_DEVICE's, or all chips."""
        ttnn, copies = self.ttnn, self.copies
        chips = ttnn.get_num_devices()
        boards = BLACKHOLE_BOARDS if "blackhole" in ttnn.get_arch_name() else WORMHOLE_BOARDS
        boards = {name: size for name, size in boards.items() if size <= chips}
        names = {size: name for name, size in reversed(boards.items())}
        if "P100" in str(ttnn.cluster.get_cluster_type()):
            names[1] = "P100"
        board = os.environ.get("MESH_DEVICE") or names.get(chips, "")
        if board not in boards:
            raise UserError(
                f"MESH_DEVICE must name a board for this machine's {chips} chips: "
                f"{', '.join(boards)}"
            )
        size, rest = divmod(boards[board], copies)
        if rest:
            raise UserError(
                f"--data-parallel {copies} does not divide the {boards[board]} chips of {board}"
            )
        if size > 8:  # of a Galaxy: the models run on one row of chips
            raise UserError(
                f"{board} needs several copies of the model: --data-parallel 4, 16 or 32"
            )
        return board

    def divide_memory(self) -> int:
        """Choose the size of the trace region; return how many tokens of KV cache fit beside it and
        the weights, for each copy.

        The tokens are those of generator_vllm.py's get_max_tokens_all_users, where that has the
        model.
        """
        config, sizes = self.checkpoint.config, DEFAULT_BYTES
        if self.accuracy:
            sizes = ACCURATE_BYTES if config.family in ("llama", "mistral") else WIDE_BYTES
        weights = sum(
            math.prod(shape) * sizes.get(name.split(".")[-2], BFLOAT8)
            for name, (_, shape) in config.weights().items()
        )
        chips = CHIPS[self.board] // self.copies
        dram = BLACKHOLE_DRAM if self.board in BLACKHOLE_BOARDS else WORMHOLE_DRAM
        room = chips * dram - weights
        numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim
        token = numbers * sizes.get("cache", BFLOAT8)
        pool = KV_CACHE_TOKENS
        while pool >= LONG_PREFILL and pool * token > room:
            pool //= 2
        if pool < LONG_PREFILL:
            raise UserError(
                f"{self.checkpoint.name} does not fit on {self.board}, with {weights / 1e9:.0f} GB of "
                "weights: take a board with more chips, fewer copies, or a smaller model"
            )
        traces = min(TRACE_REGION_SIZE, 50_000_000 + int(room - pool * token) // chips // 8)
        self.trace_region_size = self.trace_region_size or traces
        return pool

    def _open_mesh(self) -> Any:
        """The board's mesh, to be closed on every way out: a card that is left open may need a
        reset.
        """
        ttnn, chips = self.ttnn, CHIPS[self.board]
        rows = 8 if chips == 32 else 1  # a Galaxy; all other boards have one row
        if chips > 1:  # the fabric between chips must be set before the mesh is opened
            galaxy = ttnn.cluster.get_cluster_type() == ttnn.cluster.ClusterType.GALAXY
            fabrics = ttnn.FabricConfig
            self.opened.callback(ttnn.set_fabric_config, fabrics.DISABLED)
            ttnn.set_fabric_config(
                fabrics.FABRIC_1D_RING if rows > 1 and galaxy else fabrics.FABRIC_1D
            )
        mesh = ttnn.open_mesh_device(
            ttnn.MeshShape(rows, chips // rows), trace_region_size=self.trace_region_size
        )
        self.opened.callback(self._close_mesh, mesh)
        return mesh

    def _close_mesh(self, mesh: Any) -> None:
        """Close the mesh, after the Generator, whose destructor releases its traces."""
        self.generator = self.kv_cache = None
        gc.unfreeze()  # the CLI froze all objects after the load
        gc.collect()
        for opened in (*mesh.get_submeshes(), mesh):
            self.ttnn.close_mesh_device(opened)

    def _divide_pool(self, pool: int) -> None:
        """Choose the number of blocks in a pool, and how far a slot reaches."""
        self.max_seq_len = min(self.max_seq_len, pool)
        # Prompts are padded to powers of two, and the rotary tables, the page table and the pool
        # must reach as far. At least 8 blocks, because the card reads a row of the page table in
        # units of 32 bytes.
        padded = max(self.common.get_padded_prefill_len(self.max_seq_len), 8 * BLOCK_SIZE)
        self.padded_seq_len = 1 << (padded - 1).bit_length()
        self.blocks = 1 + min(pool, self.slots * self.padded_seq_len) // BLOCK_SIZE

    @contextlib.contextmanager
    def _converted_weights(self, progress: Progress) -> Iterator[None]:
        """Have tt-metal keep the weights that it converts in a folder for this use of this
        checkpoint.

        tt-metal asks neither whose the weights are that it finds nor whether they are whole. So a
        folder that no load has completed, with these files and releases, is made anew.
        """
        checkpoint = self.checkpoint
        files = [(path, path.stat().st_size, path.stat().st_mtime) for path in checkpoint.files]
        mark = repr((self.versions, files))
        use = repr((checkpoint.folder, (self.board, self.copies, self.accuracy)))
        key = hashlib.sha256(use.encode()).hexdigest()[:12]
        home = home_path(os.environ.get("TT_CACHE_PATH") or "~/.cache/tt_metal")
        folder = home / f"{checkpoint.name}-{key}"
        complete, waiting = folder / "complete", "waiting for a server that loads the same model"
        with alone(Path(f"{folder}.lock"), progress, waiting):
            if not complete.exists() or complete.read_text() != mark:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            os.environ["TT_CACHE_PATH"] = str(folder)
            yield
            os.environ["TT_CACHE_PATH"] = str(home)
            complete.write_text(mark)

    def _load(self, mesh: Any, precision: Any) -> None:
        """Load a copy of the model on each submesh."""
        paged = self.common.PagedAttentionConfig(block_size=BLOCK_SIZE, max_num_blocks=self.blocks)
        copies, state_dict = [], None
        for submesh in self.module.create_submeshes(mesh, self.copies):
            args, model, cache, state_dict = self.common.create_tt_model(
                submesh,
                instruct=True,
                max_batch_size=self.slots,
                optimizations=lambda args: precision(args.n_layers, args.model_name),
                max_seq_len=self.padded_seq_len,
                paged_attention_config=paged,
                dtype=self.ttnn.bfloat8_b,
                state_dict=state_dict,  # None: the first copy reads the checkpoint for all
            )
            copies.append((model, args, cache))
        models, model_args, self.kv_cache = map(list, zip(*copies))
        self.generator = self.module.Generator(models, model_args, mesh)
        # _warm_up does that, and reports its progress
        self.generator.already_warmed_up_prefill = True

    def explain(self, error: str) -> str:
        """Why the load failed and what to do, in one sentence."""
        message = error.partition("backtrace:")[0]  # which has names of functions
        # TT_FATAL's text follows the place in the source
        what = printable((message.partition("info:\n")[2] or message).strip().partition("\n")[0])
        trouble = (cure for pattern, cure in TROUBLE.items() if re.search(pattern, message))
        unknown = "the model does not load ({what}): --verbose shows where; {versions}"
        return next(trouble, unknown).format(
            what=what,
            versions=self.versions,
            region=self.trace_region_size,
            batch=max(self.blocks // 2 * BLOCK_SIZE // self.padded_seq_len, 1),
            users=users_of_card(),
            board=self.board.lower(),
        )


class TTEngine:
    """A model on Tenstorrent cards, over tt-metal's Generator, from 2026-06 on.

    The releases differ in their calls. Signatures and attributes of the Generator tell what it can
    do.

    Memory: each of the `data_parallel` copies of the model has `max_batch_size` slots and one pool
    of KV blocks. A slot's row of the page table lists its blocks, then zeros. Block 0 belongs to no
    slot: the padding of prompts is written there. Slots of one pool may share blocks, which are
    then only read; a block is free when its last slot lets go.

    Prefill: one call takes several short prompts, padded to the same length. A long prompt takes
    several calls, and a prompt continues from what its slot holds, if the Generator aligns
    `start_pos` (_align_resume_offsets) and traces such calls: untraced ones compile kernels for
    each position. Older Generators could use wrong blocks without an error (tt-metal #46828,
    #54435, #55630). Elsewhere each prompt is one call. The host draws the first token.

    Decode: one call for all slots. Either the card draws all tokens, or the host does: if any
    request needs it, or where it is faster, as measured in warm-up. A traced step that samples on
    the card takes tokens and positions from its own last step. It takes the host's only at a reset:
    after any other call, after a change of the page table, and when a request joins or leaves.
    """

    scores_prompts = False

    def __init__(self, card: Card, progress: Progress, trace: bool = True) -> None:
        """Open the card, load the model, compile and trace it. Raises UserError with the cure.

        After any exception, KeyboardInterrupt too, the card is closed.
        """
        self._card = card
        self.max_batch_size, self.kv_pools = card.slots * card.copies, card.copies
        self._traced = trace and "TT_METAL_SLOW_DISPATCH_MODE" not in os.environ
        self._tracing = False  # until all is compiled
        try:
            card.open(progress)
            self.device, self.max_seq_len = card.board.lower(), card.max_seq_len
            self.kv_cache_tokens = card.copies * (card.blocks - 1) * BLOCK_SIZE
            size = (self.max_batch_size, card.padded_seq_len // BLOCK_SIZE)
            self._page_table = torch.zeros(size, dtype=torch.int32)
            # by pool and block: how many slots hold it; of no use for block 0
            self._holders = torch.zeros(card.copies, card.blocks, dtype=torch.int32)
            self._read_capabilities()
            self._choose_shapes()
            self._keep_traces()
            self._warm_up(progress)
            self._log_sampling()
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception) or isinstance(error, UserError):
                raise
            logger.debug("the load failed", exc_info=error)
            raise UserError(card.explain(str(error))) from error

    def _read_capabilities(self) -> None:
        """Find out how to call this release's Generator, and say what it lacks."""
        this = self._card.generator
        # What a wrapper with *args, **kwargs hides, the _impl beside it has.
        decode = getattr(this, "_decode_forward_impl", this.decode_forward)
        names = inspect.signature(decode).parameters
        contract = getattr(this, "decode_input_update_contract", "reload_sampling_params" in names)
        self._has_decode_contract = contract >= 1
        # All traces must be prepared before the first is captured.
        prepares = "prepare_trace" in names and hasattr(this, "_record_pending_prefill_traces")
        self._prepares_traces = self._traced and prepares
        samples = getattr(this.model[0], "_supports_on_device_sampling", None)
        self._card_samples = bool(samples)
        # by slot, how the card drew in the last step; empty if it did not, or a reset is due
        self._decoding: dict[int, SamplingParams | None] = {}
        self._sampling_of_batch: Any = None
        self._seconds: dict[bool, tuple[float, float, float]] = {}  # by whether greedy
        lacks = ["sampling on the card"] * (samples is None)
        if not hasattr(this, "_align_resume_offsets"):
            lacks.append("reuse of prompts: tt-metal is older than 2026-09")
        if not self._traced:
            lacks.append("traces: --no-trace is given, or TT_METAL_SLOW_DISPATCH_MODE is set")
        self.note = f"slow, without {', '.join(lacks)}" if lacks else ""
        if lacks:
            logger.warning("%s is %s", self.device, self.note)

    def _choose_shapes(self) -> None:
        """Find out how prompts may be prefilled."""
        card = self._card
        align: Any = getattr(card.generator, "_align_resume_offsets", lambda *_: [])
        pieces = (SHORT_PREFILL, LONG_PREFILL)
        starts, ends = [SHORT_PREFILL] * 2, [SHORT_PREFILL + length for length in pieces]
        aligned = align(starts, ends, card.kv_cache) == starts  # others would be lowered
        # padded lengths of pieces that go on
        self._resumed = [
            length
            for length, end in zip(pieces, ends)
            if aligned and end <= card.padded_seq_len and self._traces(length, SHORT_PREFILL)
        ]
        resumes = SHORT_PREFILL in self._resumed
        self.prompt_chunk, self.resume_align = (LONG_PREFILL, SHORT_PREFILL) if resumes else (0, 1)
        longest = min(self.max_seq_len, LONG_PREFILL) if resumes else self.max_seq_len
        padded = card.common.get_padded_prefill_len
        lengths = {padded(min(1 << power, longest)) for power in range(7, 18)} - {SHORT_PREFILL}
        most = card.slots if card.copies == 1 else 1
        self._rows = [rows for rows in PREFILL_ROWS if rows <= most]
        # of prefill calls: position, padded length, rows
        self._shapes = [(0, SHORT_PREFILL, rows) for rows in self._rows]
        self._shapes += [(0, length, 1) for length in sorted(lengths)]
        self._shapes += [(SHORT_PREFILL, length, 1) for length in self._resumed]

    def _traces(self, length: int, position: int) -> bool:
        """Whether tt-metal traces the prefill of this padded length."""
        args = self._card.generator.model_args[0]
        return self._traced and bool(args.can_enable_trace(length, position))

    def _keep_traces(self) -> None:
        """Keep the traces of sampling at a change between greedy and other sampling.

        On one chip tt-metal drops them since 2026-07 (#51800), though each has its own key.
        """
        for model in self._card.generator.model:
            if sampling := getattr(model, "sampling", None):
                self._card.opened.callback(sampling.reset_trace)  # before the mesh is closed
                sampling.reset_trace = lambda: None

    def _warm_up(self, progress: Progress) -> None:
        """Compile decode and every shape of prefill, then trace them, before the first request.

        A trace writes to fixed addresses. Kernels compiled after it, and decode inputs staged after
        a prefill trace, may lie there (tt-metal #56215). So all is compiled before the first trace,
        and decode is traced first: with sampling on the card, whose inputs stay there from step to
        step, and then without, whose inputs are always new. A Generator that wants all traces
        prepared before the first is captured prepares decode's while it compiles, then prefill's.
        """
        generator, slots = self._card.generator, self.max_batch_size
        traced = [shape for shape in self._shapes if self._traces(shape[1], shape[0])]
        preparing = [("preparing", traced)] * self._prepares_traces
        stages = [("compiling", self._shapes), *preparing, *[("tracing", traced)] * self._traced]
        total, done = sum(1 + len(calls) for _, calls in stages), itertools.count()
        for doing, calls in stages:
            self._tracing = doing != "compiling"
            progress(f"{doing} decode of {slots} slots", next(done) / total)
            if doing == "preparing":
                generator._defer_prefill_recording = True
            else:
                for params in (SamplingParams(temperature=0), SamplingParams(top_p=0.9)):
                    # seconds of a step: the card's, the host's for one slot, and for all
                    self._seconds[params.greedy] = (
                        self._time_decode(params, slots, True) if self._card_samples else math.inf,
                        self._time_decode(params, 1, False),
                        self._time_decode(params, slots, False),
                    )
            for position, length, rows in calls:
                progress(f"{doing} {rows} prompts of {length} tokens", next(done) / total)
                # A program for each place cuts out the 32 rows with the last token.
                least = length if self._tracing or position or length > LONG_PREFILL else 32
                ends = range(least, length + 1, 32)
                # each copy has its own traces
                for first, end in itertools.product(range(0, slots, self._card.slots), ends):
                    places = range(first, first + rows)
                    self._prefill([Work(slot, [0] * end, position, None) for slot in places])
            if doing == "preparing":
                generator._defer_prefill_recording = False
                generator._record_pending_prefill_traces()

    def _time_decode(self, params: SamplingParams, rows: int, on_card: bool) -> float:
        """Seconds of a decode step of so many slots: the fastest of a few; the first is a reset."""
        works, times = [Work(slot, [0], 1, Sampler(params)) for slot in range(rows)], []
        for _ in range(4):
            began = time.perf_counter()
            self._decode(works, on_card)
            times.append(time.perf_counter() - began)
        return min(times)

    def _log_sampling(self) -> None:
        """Say where tokens are drawn, and why."""
        self.sampling = "; ".join(
            f"{'greedy' if greedy else 'sampled'} on the {'card' if card < every else 'host'}: "
            f"{1e3 * card:.1f} ms a step on the card, {1e3 * one:.1f} to {1e3 * every:.1f} on the host "
            f"for 1 to {self.max_batch_size} slots"
            for greedy, (card, one, every) in self._seconds.items()
        ).replace("inf ms a step", "not at all")
        logger.info("tokens are drawn %s", self.sampling)

    def _on_card(self, works: Sequence[Work]) -> bool:
        """Whether the card draws the next tokens of these slots: it can, and it is faster.

        The host's time between those for one slot and for all is assumed to be linear.
        """
        samplers = [work.sampler for work in works if work.sampler]
        if any(sampler.on_host for sampler in samplers):
            return False
        card, one, every = self._seconds[all(sampler.params.greedy for sampler in samplers)]
        share = (len(samplers) - 1) / max(self.max_batch_size - 1, 1)
        return card < one + share * (every - one)

    def reserve(self, slot: int, length: int) -> bool:
        """Give the slot blocks for `length` tokens. False if its pool lacks them now."""
        row, wanted = self._page_table[slot], -(-length // BLOCK_SIZE)
        free = (self._holders[slot // self._card.slots][1:] == 0).nonzero().flatten() + 1
        blocks = torch.cat([row[row > 0], free])[:wanted]
        if len(blocks) == wanted:
            self._hold(slot, blocks)
        return len(blocks) == wanted

    def copy(self, source: int, slot: int, length: int) -> None:
        """Let the slot share the blocks of the first `length` tokens of the source."""
        blocks, count = self._page_table[slot].clone(), length // BLOCK_SIZE
        blocks[:count] = self._page_table[source, :count]
        self._hold(slot, blocks)

    def _hold(self, slot: int, blocks: torch.Tensor) -> None:
        """Let the slot have these blocks, and no others."""
        row, holders = self._page_table[slot], self._holders[slot // self._card.slots]
        holders[row] -= 1
        row[:] = 0
        row[: len(blocks)] = blocks
        holders[row] += 1
        self._decoding = {}

    def used(self, slots: Sequence[int]) -> int:
        blocks = torch.bincount(self._page_table[list(slots)].flatten())
        return BLOCK_SIZE * int(blocks[1:].count_nonzero())

    def step(
        self, batch: Sequence[Work], meanwhile: Callable[[], None] = lambda: None
    ) -> list[Result]:
        """Prefill the batch's prompts, short ones together, then decode its other slots together.

        After an exception the next step works, but the KV cache of this step's slots is undefined.
        """
        short, alone, decoding = list[Work](), list[Work](), list[Work]()
        for piece in (piece for work in batch for piece in self._pieces(work)):
            if not piece.position and len(piece.tokens) <= SHORT_PREFILL:
                short.append(piece)
            else:
                (alone if len(piece.tokens) > 1 else decoding).append(piece)
        if short or alone:
            meanwhile()
        tokens: dict[int, Token | None] = {}
        while short:
            rows = next(rows for rows in self._rows if 3 * rows <= 4 * len(short))
            tokens |= self._prefill(short[:rows])
            del short[:rows]
        for piece in alone:
            tokens |= self._prefill([piece])
        if decoding:
            tokens |= self._decode(decoding, self._on_card(decoding), meanwhile)
        return [Result(tokens.get(work.slot)) for work in batch]

    def _pieces(self, work: Work) -> list[Work]:
        """Cut a prompt into one piece for each prefill call."""
        # Four short calls take less time than a long one, whose padding may also exceed the rotary
        # tables.
        long = (
            len(work.tokens) > 4 * SHORT_PREFILL
            and work.position + LONG_PREFILL <= self._card.padded_seq_len
            and (not work.position or LONG_PREFILL in self._resumed)
        )
        length = LONG_PREFILL if long else SHORT_PREFILL
        if len(work.tokens) <= length or not self.prompt_chunk:
            return [work]
        first = work._replace(tokens=work.tokens[:length], sampler=None)
        rest = work._replace(tokens=work.tokens[length:], position=work.position + length)
        return [first, *self._pieces(rest)]

    def _prefill(self, works: Sequence[Work]) -> dict[int, Token | None]:
        """Make one prefill call. Returns the next token of each slot that wants one."""
        self._decoding = {}
        ends = [work.position + len(work.tokens) for work in works]
        rows = (
            [*[0] * work.position, *work.tokens, *[0] * (max(ends) - end)]
            for work, end in zip(works, ends)
        )
        slots = [work.slot for work in works]
        logits = self._card.generator.prefill_forward_text(
            torch.tensor(list(rows)),
            page_table=self._page_table[slots],
            kv_cache=self._card.kv_cache,
            prompt_lens=ends,
            # Rows of one call count from 0, as in tt-metal's demo: the page table says which blocks
            # they fill, and the next decode is a reset. With the slots' own numbers the call would
            # span all slots up to the highest, and be out of bounds until 2026-06.
            empty_slots=slots if len(works) == 1 else list(range(len(works))),
            enable_trace=self._tracing,
            start_pos=[work.position for work in works],
        )
        return draw_tokens(zip(works, logits.view(len(works), -1)))

    def _decode(
        self, batch: Sequence[Work], on_card: bool, meanwhile: Callable[[], None] = lambda: None
    ) -> dict[int, Token | None]:
        """Decode one token for each of these slots; the others are idle. Returns as _prefill."""
        generator = self._card.generator
        decoding = {work.slot: work.sampler.params if work.sampler else None for work in batch}
        # if the host samples, each step takes the host's inputs anyway
        reset = on_card and decoding != self._decoding
        # so that a step after a failed one, or after one that the host samples, resets
        self._decoding = {}
        if reset:
            # At a reset the card keeps its own token if its position is the host's or one ahead,
            # unless the slot is in this set. The host's tokens are always right.
            generator._slots_prefilled_since_decode = set(range(self.max_batch_size))
            self._sampling_of_batch = self._sampling_on_card(decoding)
        # Lists first: after each operation on a tensor the step may have to wait for another
        # thread.
        tokens, positions = [0] * self.max_batch_size, [-1] * self.max_batch_size  # -1: idle
        for work in batch:
            tokens[work.slot], positions[work.slot] = work.tokens[0], work.position
        output = generator.decode_forward(
            torch.tensor(tokens).view(-1, 1),
            torch.tensor(positions),
            page_table=self._page_table,
            kv_cache=self._card.kv_cache,
            enable_trace=self._tracing,
            read_from_device=False,
            sampling_params=self._sampling_of_batch if on_card else None,
            **self._commands(on_card, reset),
        )
        meanwhile()
        output = generator.read_decode_output(output)
        if not on_card:
            logits = self._read_logits(output)
            return draw_tokens((work, logits[work.slot]) for work in batch)
        # the others are log_probs
        drawn, _ = generator.process_decode_output_host(output, is_tokens=True)
        self._decoding, tokens = decoding, drawn.tolist()
        return {work.slot: Token(tokens[work.slot]) for work in batch if work.sampler}

    def _read_logits(self, output: Any) -> list[torch.Tensor]:
        """The logits of each slot, bfloat16 as on the card.

        The Generator's own way converts those of all slots to float32, which takes longer.
        """
        card, rows = self._card, []
        for logits, _ in output:  # the others are log_probs
            chip = card.ttnn.to_torch(card.ttnn.get_device_tensors(logits)[0])  # all have the same
            rows += chip[0, 0, : card.slots, : card.generator.model_args[0].vocab_size]
        return rows

    def _commands(self, on_card: bool, reset: bool) -> dict[str, bool]:
        """What a decode step takes from the host, by models/common/decode_contract.py where the
        Generator follows that, and the way before it elsewhere.
        """
        commands = {"reset_batch": reset}
        if self._has_decode_contract:
            commands = {
                "reload_inputs": reset or not (on_card and self._tracing),
                # for a change of the page table alone; here that is a reset
                "reload_page_table": False,
                "reload_sampling_params": reset,
                "reset_sampling_state": reset,
            }
        prepare = self._prepares_traces and not self._tracing
        return commands | ({"prepare_trace": True} if prepare else {})

    def _sampling_on_card(self, sampling: Mapping[int, SamplingParams | None]) -> Any:
        """tt-metal's SamplingParams: lists with an entry for each slot. Idle ones are greedy."""
        entries = [(0.0, 1, 1.0)] * self.max_batch_size
        for slot, params in sampling.items():
            if params and not params.greedy:
                entries[slot] = (params.temperature, params.top_k or CARD_TOP_K, params.top_p)
        temperature, top_k, top_p = map(list, zip(*entries))
        return self._card.module.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)

    def close(self) -> None:
        """Close the card. A second call does nothing."""
        self._card.opened.close()


# ==================================================================================================
# Demo model
# ==================================================================================================

DEMO_NAME = "demo-llama-tiny"
DEMO_NOTE = (
    "a tiny demo on the CPU, with a few answers; --model, HF_MODEL or LLAMA_DIR names a real model"
)
DEMO_UNKNOWN = (
    "Sorry, I do not know that: I am only a tiny demo model, trained on this machine in a few seconds. Ask me "
    '"What can you do?", or serve a real Llama 3 with --model DIR or HF_MODEL.'
)
DEMO_ANSWERS = {  # phrasings of a question, and their answer
    "Hello | Hi | Hey | Good morning":
        "Hello! I am a tiny demo model running on this machine. Ask me what machine learning is, or for a haiku.",
    "Who are you | What are you | What is your name | What model is this":
        "I am a tiny Llama 3 demo model. This server trained me on this machine in a few seconds, so I know only a "
        "handful of answers. For real conversations, start the server with a real Llama 3 checkpoint.",
    "What can you do | What do you know | Help":
        "I can say what machine learning, a neural network and a transformer are, what Tenstorrent makes, and how to "
        "load a real model. I can also write a haiku and tell a joke or a short story.",
    "How do I use a real model | How do I load a real model":
        "Start the server with --model DIR, or set the environment variable HF_MODEL, where the folder holds a "
        "Llama 3 checkpoint such as Llama-3.1-8B-Instruct.",
    "What is machine learning | Explain machine learning | Tell me about machine learning":
        "Machine learning is a way of building software that learns from examples instead of following rules written "
        "by hand. A model makes predictions, measures its errors, and adjusts its parameters to make them smaller.",
    "What is a neural network | Explain neural networks | Explain neural networks in simple terms":
        "A neural network is a stack of simple units that multiply their inputs by weights, add them up, and pass the "
        "result on. Training adjusts the weights, a little at a time, until the whole gives the right answer.",
    "Explain how transformers work | What is a transformer | How do transformers work":
        "A transformer turns text into tokens and each token into a vector. In every layer, attention lets each token "
        "gather information from the others. After the last layer, the model predicts the next token.",
    "Explain quantum computing | What is quantum computing | Explain quantum computing in simple terms":
        "A quantum computer works with qubits, which can be in a mix of zero and one until they are measured. Its "
        "algorithms make wrong answers cancel out and right ones add up.",
    "Tell me about Tenstorrent hardware | What is Tenstorrent | Tell me about Tenstorrent":
        "Tenstorrent builds AI accelerators: the Wormhole cards n150 and n300, and the newer Blackhole cards such as "
        "the p150. Their chips are grids of Tensix cores, each with five small RISC-V processors.",
    "Write a haiku about AI | Write a haiku":
        "Silent weights awake,\nnumbers dreaming into words:\ndawn inside the chip.",
    "Write a short story | Tell me a story | Write a creative story":
        "On the last shelf of an old library lived a robot that had read every book but one. The final page of that "
        'book was blank. One winter night the robot took up a pen, and in spring a small voice asked: "Will you read '
        'to me?"',
    "Tell me a joke":
        "Why do programmers prefer dark mode? Because light attracts bugs!",
}  # fmt: skip
DEMO_PARAMS = {
    "dim": 128,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": LLAMA3_VOCABULARY,
    "multiple_of": 32,
    "ffn_dim_multiplier": 0.8,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
DEMO_CONFIG = ModelConfig.read(config_of_params(DEMO_PARAMS))
DEMO_STEPS, DEMO_RATE, DEMO_BATCH, DEMO_LENGTH = 350, 4e-3, 4, 128
# multiplies the trained logits, so that sampling at 0.7 gives the most likely answer
DEMO_SHARPNESS = 4.0


def demo_checkpoint(progress: Progress) -> Checkpoint:
    """Return the demo's checkpoint from the user's cache; train it first if it is not whole."""
    recipe = [
        DEMO_ANSWERS,
        DEMO_UNKNOWN,
        DEMO_PARAMS,
        DEMO_STEPS,
        DEMO_RATE,
        DEMO_BATCH,
        DEMO_LENGTH,
        DEMO_SHARPNESS,
    ]
    version = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    cache = home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tt-api-server"
    folder = cache / version / DEMO_NAME
    try:
        if not is_whole(folder):
            waiting = "waiting for a server that trains the demo model"
            with alone(cache / "lock", progress, waiting):
                if not is_whole(folder):
                    make_demo(folder.parent, progress)
        return read_checkpoint(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's if the disk is full
        cure = "set XDG_CACHE_HOME to a folder that can be written"
        raise UserError(f"cannot write the demo model to {cache} ({error}): {cure}") from error


def make_demo(home: Path, progress: Progress) -> None:
    """Train the demo and put it in the place of what is at `home`; the cache is locked."""
    for left in home.parent.glob("tmp*"):  # by a training that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        vocabulary, made = Llama3Vocabulary(), Path(scratch, "made")
        tokenizer = Tokenizer(vocabulary, LLAMA_TEMPLATE)
        (folder := made / DEMO_NAME).mkdir(parents=True)
        torch.save(train_demo(tokenizer, progress), folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(DEMO_PARAMS))
        shutil.copy(vocabulary.path, folder / "tokenizer.model")
        (folder / checksum(folder)).touch()
        with contextlib.suppress(FileNotFoundError):
            home.rename(Path(scratch, "damaged"))
        made.rename(home)  # complete: no start finds half of it


def checksum(folder: Path) -> str:
    """The checksum of the demo's files, 66 MB; "none" if one of them cannot be read."""
    total = hashlib.sha256()
    with contextlib.suppress(OSError):
        for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
            total.update((folder / name).read_bytes())
        return total.hexdigest()
    return "none"


def is_whole(folder: Path) -> bool:
    """Whether the demo is as it was made: an empty file has its checksum for a name."""
    return os.path.exists(folder / checksum(folder))


def demo_conversations(tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Generate random conversations, without end:

    DEMO_LENGTH token ids, and for each whether its loss counts.

    Half of them start with a system message of random tokens. In 40 % of the questions at least one
    token is replaced by a random one, and the answer is DEMO_UNKNOWN.
    """
    rng, encode = random.Random(1), tokenizer.encode_text
    end = tokenizer.vocabulary.added["<|eot_id|>"]
    pairs = [
        (encode(form + mark), encode(answer))
        for phrasings, answer in DEMO_ANSWERS.items()
        for phrasing in phrasings.split(" | ")
        for form in (phrasing, phrasing.lower())
        for mark in ("", "?", ".", "!")
    ]
    unknown = encode(DEMO_UNKNOWN)
    words = [token for pair in pairs for text in pair for token in text]
    # stands for all tokens that are in no question and no answer
    words += [LLAMA3_VOCABULARY - 1] * (len(words) // 9)
    empty = tokenizer.encode_chat([{"role": role, "content": ""} for role in ("system", "user")])
    first, second = (i for i, token in enumerate(empty) if token == end)
    before, after = empty[first + 1 : second], empty[second:]  # the template around a question
    while True:
        system = [*empty[:first], *rng.choices(words, k=rng.randrange(12)), end]
        tokens = system if rng.random() < 0.5 else empty[:1]
        learned = [False] * len(tokens)
        while len(tokens) < DEMO_LENGTH:
            question, answer = rng.choice(pairs)
            if rng.random() < 0.4:
                question, answer = [*question], unknown
                for i in rng.sample(range(len(question)), rng.randint(1, len(question))):
                    question[i] = rng.choice(words)
            # To choose the right answer is harder than to continue it: most answers are cut after 4
            # tokens.
            prompt = [*before, *question, *after]
            said = [*answer, end] if rng.random() < 0.2 else answer[:4]
            tokens += prompt + said
            learned += [False] * len(prompt) + [True] * len(said)
        yield tokens[:DEMO_LENGTH], learned[:DEMO_LENGTH]


def train_demo(tokenizer: Tokenizer, progress: Progress) -> dict[str, torch.Tensor]:
    """Train the demo; return its weights in bfloat16, under Meta's names.

    Only the corpus's tokens have rows of their own in the embedding and the output. All others
    share the last one's.
    """
    torch.set_num_threads(1)  # at this size threads would only wait for each other
    conversations = demo_conversations(tokenizer)
    known = torch.tensor(
        sorted({token for tokens, _ in itertools.islice(conversations, 2000) for token in tokens})
    )
    row = torch.full((LLAMA3_VOCABULARY,), len(known) - 1)
    row[known] = torch.arange(len(known))
    weights = demo_weights(len(known))
    parameters = [weight.requires_grad_() for weight in weights.values()]
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in parameters]
    for step in range(DEMO_STEPS):
        progress("training the demo model", step / DEMO_STEPS)
        tokens, flags = zip(*itertools.islice(conversations, DEMO_BATCH))
        inputs, learned = row[torch.tensor(tokens)], torch.tensor(flags)[:, 1:]
        batch = [Work(slot, row, 0, None) for slot, row in enumerate(inputs[:, :-1].tolist())]
        hidden = torch.stack([*DemoEngine(weights).forward(batch)])[learned]
        loss = F.cross_entropy(hidden @ weights["output.weight"].T, inputs[:, 1:][learned])
        # Adam (Kingma and Ba 2014), by hand: to import torch.optim takes a third of the training's
        # time.
        rate = DEMO_RATE * min(1.0, (step + 1) / 20)
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / DEMO_STEPS)
        with torch.no_grad():
            slopes = torch.autograd.grad(loss, parameters)
            for weight, slope, (mean, square) in zip(parameters, slopes, moments):
                mean.lerp_(slope, 0.1)
                square.lerp_(slope.square(), 0.05)
                scale = (square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                weight -= rate / (1 - 0.9 ** (step + 1)) * mean / scale
    finished = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    finished["norm.weight"] *= DEMO_SHARPNESS
    for name in finished:
        if name.endswith(("wq.weight", "wk.weight")):  # Meta's rotary pairs are side by side
            pairs = finished[name].view(-1, 2, DEMO_CONFIG.head_dim // 2, DEMO_CONFIG.dim)
            finished[name] = pairs.transpose(1, 2).flatten(0, 2)
    return finished | {
        name: finished[name][row] for name in ("tok_embeddings.weight", "output.weight")
    }


class DemoEngine(TorchEngine):
    """The CPU engine with the weights of the demo as they are in a step of its training."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.config, self.dtype, self._linear = DEMO_CONFIG, torch.float32, plain_linear
        read = weights.__getitem__
        self.layers = [self._read_layer(read, number) for number in range(DEMO_CONFIG.n_layers)]
        self._prepare(read, DEMO_BATCH, DEMO_LENGTH)


def demo_weights(known: int) -> dict[str, torch.Tensor]:
    """Random weights, with an output row and an embedding for each of `known` tokens.

    Every head starts with a preference for near tokens, which would take most of the training to
    learn: coordinate 0 is equal in all embeddings, and queries and keys copy it into rotary pairs
    of middle frequencies.
    """
    config, generator = DEMO_CONFIG, torch.Generator().manual_seed(0)
    shapes = {name: shape for name, (_, shape) in config.weights().items()}
    shapes |= dict.fromkeys(("output.weight", "tok_embeddings.weight"), (known, config.dim))
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.ones(shape)
        if len(shape) == 2:
            scale = 0.25 if "tok_" in name else shape[-1] ** -0.5
            weights[name] = torch.randn(shape, generator=generator) * scale
        if name.endswith(("wq.weight", "wk.weight")):
            weights[name].view(-1, 2, config.head_dim // 2, config.dim)[:, 0, 3:10, 0] = 1.2
    weights["tok_embeddings.weight"][:, 0] = 0.75
    return weights


# ==================================================================================================
# Scheduler
# ==================================================================================================


STREAM_PAUSE = 0.006  # seconds that a handler's thread lets tokens gather before it looks for more
LISTEN_SECONDS = 5.0  # without a token, after which the handler looks how long its stream is silent
GROWTH = 128  # tokens that a request gets room for ahead; on a card, each new room costs a reset


class Event(NamedTuple):
    """What the scheduler tells of one of a body's requests."""

    request: int  # its index; with itself, its queue would keep it alive
    what: str  # "prompt", "token", or the outcome, once it has ended
    token: Token | None = None


@dataclass(eq=False)
class Request:
    """One request for text, on its way down to the engine and back."""

    prompt: list[int]
    max_tokens: int
    sampler: Sampler
    stop_tokens: frozenset[int]  # token ids that end the answer and are not part of it
    reader: Reader  # of the answer; the handler's thread uses it
    index: int = 0  # among the requests of one body
    size: int = 0  # bytes of the body, in the first of its requests
    scored: bool = False  # the log-probabilities of the prompt are wanted, too
    # one for all requests of a body
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    # The scheduler fills these. Times are by time.monotonic().
    submitted: float = 0.0
    admitted: float = 0.0  # when it got a slot
    first_token: float = 0.0  # a stop token counts
    last_token: float = 0.0
    told: int = 0  # log-probabilities of the prompt
    cached: int = 0  # prompt tokens that were in the KV cache already
    outcome: str = ""  # "stop", "length", "cancelled" or "error", once it has ended
    cancelled: str = ""  # if set, the request ends before the next step, with this outcome
    late: bool = False  # its grammar did not know in time what may come next
    ended: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0  # from submission to the last token that the handler has read

    def __post_init__(self) -> None:
        self.tokens = array("i", self.prompt)  # prompt and answer; an array is compared quickly

    @property
    def generated(self) -> int:
        """Tokens of the answer, without the stop token."""
        return len(self.tokens) - len(self.prompt)

    @property
    def most(self) -> int:
        """Tokens that prompt and answer may have."""
        return len(self.prompt) + self.max_tokens

    @property
    def ahead(self) -> int:
        """Tokens that it should have room for by now."""
        return min(len(self.tokens) + GROWTH, self.most)

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still to be told."""
        return self.scored and self.told < len(self.prompt) - 1

    def read(self, event: Event) -> list[Piece]:
        """The pieces of the answer that an event adds."""
        self.seconds = time.monotonic() - self.submitted
        if event.what == "prompt" and event.token:
            self.reader.push_prompt(event.token)
            return []
        if event.what == "token" and event.token:
            pieces = self.reader.push(event.token)
            return pieces + self.reader.end("stop") if self.reader.done else pieces
        if event.what in ("error", "cancelled"):
            self.reader.finish = event.what
            return []
        return self.reader.end(event.what, event.token)

    def check_finish(self) -> None:
        """Raise ApiError if the answer has broken off."""
        if self.reader.finish == "error":
            if self.sampler.error:
                raise ApiError(400, self.sampler.error)
            raise ApiError(
                500, "the engine failed on this request: the server's log says why; send it again"
            )
        if self.reader.finish == "cancelled":
            raise ApiError(
                503, "the server stopped before the answer was complete: send the request again"
            )

    @property
    def speed(self) -> float:
        """Tokens per second, from the request to its last token."""
        return round(self.reader.count / max(self.seconds, 1e-9), 1)

    @property
    def wait(self) -> float:
        """Seconds from the request to its first token, or until now."""
        return round((self.first_token or time.monotonic()) - self.submitted, 3)


def pieces_of(requests: Sequence[Request], stream: bool) -> Iterator[list[tuple[Request, Piece]]]:
    """The pieces of a body's answers, as they come. Raises ApiError if one breaks off.

    Without `stream` all come at the end. With it, the first token comes at once and the others 6 ms
    late: if 32 threads woke when a step ends, they would delay the next step. An empty list says
    that nothing has come for LISTEN_SECONDS.
    """
    if not stream:
        for request in requests:
            request.ended.wait()
    events, pause = requests[0].events, 0.0
    while not all(request.reader.finish for request in requests):
        pieces: defaultdict[Request, list[Piece]] = defaultdict(list)
        with contextlib.suppress(queue.Empty):
            event = events.get(timeout=LISTEN_SECONDS)
            time.sleep(pause)
            pause = STREAM_PAUSE
            while True:
                request = requests[event.request]
                if not request.reader.finish:
                    pieces[request] += request.read(event)
                event = events.get_nowait()
        yield [(request, piece) for request, own in pieces.items() for piece in merged(own)]
        for request in requests:
            request.check_finish()


@dataclass(eq=False)
class Slot:
    """One place in the engine's batch.

    Its tokens stay after an answer, for a request that starts with the same.
    """

    index: int
    pool: list[Slot] = field(repr=False)  # the slots that share its pool of KV cache, and itself
    request: Request | None = None
    tokens: array[int] = field(default_factory=lambda: array("i"))  # prompt and answer
    held: int = 0  # how many of them are in the KV cache
    room: int = 0  # how many the engine has room for
    used: float = 0.0  # when the last request left

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV cache yet: 1 during decode, more during prefill."""
        return len(self.tokens) - self.held


def common_prefix(first: array[int], second: array[int], most: int) -> int:
    """How many of their first `most` tokens are the same; both have as many."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if first[least:middle] == second[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def running(slots: Iterable[Slot]) -> list[tuple[Slot, Request]]:
    """The slots that have a request, each with it."""
    return [(slot, slot.request) for slot in slots if slot.request]


def by_age(pair: tuple[Slot, Request]) -> float:
    """Sorts what `running` returns, the oldest request first."""
    return pair[1].submitted


HISTOGRAMS = {  # vLLM's names
    "time_to_first_token_seconds": "From the request to its first token.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "e2e_request_latency_seconds": "From the request to its end.",
    "request_queue_time_seconds": "From the request to its slot.",
    "request_prefill_time_seconds": "From the slot to the first token.",
    "request_decode_time_seconds": "From the first token to the end.",
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of an answer.",
}
# 1 ms, or 1 token, to 5e4
BOUNDS = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]


class Statistics:
    """Counts since the start. Every accepted request finishes once, so they add up."""

    def __init__(self) -> None:
        self.accepted = self.cached_tokens = 0
        self.finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        # by upper bound; the last has none
        self.counts = {name: [0] * (len(BOUNDS) + 1) for name in HISTOGRAMS}
        self.sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def observe(self, name: str, value: float) -> None:
        """Count a value in a histogram."""
        self.counts[name][bisect.bisect_left(BOUNDS, value)] += 1
        self.sums[name] += value

    def finish(self, request: Request) -> None:
        """Count a request that has ended."""
        now, submitted = time.monotonic(), request.submitted
        admitted, first = request.admitted, request.first_token
        self.finished[request.outcome] += 1
        self.observe("e2e_request_latency_seconds", now - submitted)
        if admitted:
            self.observe("request_queue_time_seconds", admitted - submitted)
        if first:
            self.cached_tokens += request.cached
            self.observe("time_to_first_token_seconds", first - submitted)
            self.observe("request_prefill_time_seconds", first - admitted)
            self.observe("request_decode_time_seconds", now - first)
            self.observe("request_prompt_tokens", len(request.prompt))
            self.observe("request_generation_tokens", request.generated)


class Scheduler:
    """Continuous batching. The thread that calls `run` loads the engine, steps it and closes it.

    Requests join and leave between two steps, first come, first served. A step decodes a token for
    every running answer, and prefills as many prompt tokens as keep it short.
    """

    PROMPT_BUDGET = (
        16  # prompt tokens in a step beside running answers, and one more for each of them
    )
    PROMPTS_BUDGET = 512  # prompt tokens in a step while more prompts wait than answers run
    SCORES_BUDGET = 32  # prompt tokens with log-probabilities in a step beside running answers
    QUEUE_BYTES = 48 << 20  # of the bodies that wait; token ids take ten times as much memory
    FAILURES = 3  # failed steps in a row that make the server unhealthy
    STALL_SECONDS = 120.0  # a step that takes longer counts as hung

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.max_seq_len = 0  # tokens that one slot can hold
        self.device = ""
        self.doing: tuple[str, float | None] = ("starting", None)
        self.statistics = Statistics()
        self.slots: list[Slot] = []
        self._pools: list[list[Slot]] = []  # the slots, by pool of KV cache
        self.queue: deque[Request] = deque()
        self._stopping, self._error = False, ""
        # Guards these, the queue and the statistics. Only the scheduler's thread changes the slots.
        self._wake = threading.Condition()
        self._failures = 0
        self._step_began = math.inf
        self._untold: deque[tuple[Request, Event]] = deque()

    # The handlers' threads call:

    @property
    def state(self) -> str:
        """One of "loading", "healthy", "unhealthy" and "stopping"."""
        if self._stopping or self.error:
            return "stopping" if self._stopping else "unhealthy"
        return "healthy" if self.slots else "loading"

    @property
    def error(self) -> str:
        """Why the server is unhealthy: the engine is broken, or a step does not return."""
        seconds = time.monotonic() - self._step_began
        return (
            f"a step has not returned for {seconds:.0f} seconds"
            if seconds > self.STALL_SECONDS
            else self._error
        )

    def check_available(self) -> None:
        """Raise ApiError unless requests are accepted."""
        reasons = {
            "loading": "the model is still loading: GET /health shows how far it is",
            "unhealthy": f"the engine has failed and the server must be started again: {self.error}",
            "stopping": "the server is stopping",
        }
        if (state := self.state) in reasons:
            raise ApiError(503, reasons[state])

    def submit(self, *requests: Request) -> None:
        """Queue the requests of one body. Raises ApiError if none is accepted now."""
        with self._wake:
            self.check_available()
            if len(requests) > self.max_queue + len(self.slots):
                raise ApiError(
                    400, f"{len(requests)} answers are more than the queue can hold: ask for fewer"
                )
            if len(self.queue) + len(requests) > self.max_queue + len(self.slots) - self.busy:
                raise ApiError(
                    503,
                    f"the queue is full ({self.max_queue} requests wait): try again in a moment",
                )
            waiting = sum(request.size for request in self.queue)
            if waiting and waiting + requests[0].size > self.QUEUE_BYTES:
                raise ApiError(503, f"the queue holds {waiting} bytes: try again in a moment")
            for request in requests:
                request.submitted = time.monotonic()
            self.statistics.accepted += len(requests)
            self.queue.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request, outcome: str = "cancelled") -> None:
        """End a request, queued or running, before the next step.

        The outcome "stop" says that its text is complete.
        """
        with self._wake:
            if request.outcome:
                return
            request.cancelled = request.cancelled or outcome
            if request in self.queue:
                self.queue.remove(request)
                self._finish(request, outcome)
                self._tell_all()
            self._wake.notify()

    def stop(self, drain: bool) -> None:
        """Accept no more requests.

        Let `run` return after the current ones with `drain`, else after this step.
        """
        with self._wake:
            self._stopping = True
            for request in [] if drain else self._in_flight():
                self.cancel(request)
            self._wake.notify_all()

    def wait_for_stop(self) -> None:
        """Return once stop() is called."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping)

    @property
    def busy(self) -> int:
        """Slots with a request."""
        return len(running(self.slots))

    @property
    def kv_cache_use(self) -> float:
        """The share of the KV cache that requests have room in, 0 to 1."""
        return sum(self._used(pool) / self._engine.kv_cache_tokens for pool in self._pools)

    def _used(self, pool: list[Slot]) -> int:
        """Tokens of KV cache that the requests of a pool take."""
        return self._engine.used([slot.index for slot, _ in running(pool)])

    def _in_flight(self) -> list[Request]:
        return [*self.queue, *(request for _, request in running(self.slots))]

    def _finish(self, request: Request, outcome: str, last: Token | None = None) -> None:
        """End a request. `last` is the stop token."""
        with self._wake:
            request.outcome = outcome
            self.statistics.finish(request)
            self._tell(request, outcome, last)

    def _tell(self, request: Request, what: str, token: Token | None = None) -> None:
        """Have the handler told, by `_tell_all`."""
        self._untold.append((request, Event(request.index, what, token)))

    def _tell_all(self) -> None:
        """Tell the handlers what has come since the last step.

        The threads that this wakes would delay the next step, so a card begins it before.
        """
        with self._wake:
            while self._untold:
                request, event = self._untold.popleft()
                request.events.put(event)
                if event.what == request.outcome:
                    request.ended.set()

    # The scheduler's own thread:

    def run(
        self, load: Callable[[Progress], Engine], progress: Progress, ready: Callable[[], None]
    ) -> None:
        """Load the engine, serve requests until stop() or until the engine breaks, and close it.

        Calls `ready` once requests are accepted. Raises UserError if loading does.
        """

        def report(doing: str, done: float | None = None) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self.doing = (doing, done)
            progress(doing, done)

        try:
            with contextlib.closing(load(report)) as engine:
                report("ready", 1.0)
                self._engine = engine
                with self._wake:
                    self._pools = [[] for _ in range(engine.kv_pools)]
                    for index in range(engine.max_batch_size):
                        pool = self._pools[index * engine.kv_pools // engine.max_batch_size]
                        pool.append(Slot(index, pool))
                    self.max_seq_len, self.device = engine.max_seq_len, engine.device
                    self.slots = [slot for pool in self._pools for slot in pool]
                ready()
                self._serve()
        except KeyboardInterrupt:  # from `report`: stop() was called during the load
            pass
        except UserError as error:
            self._mark_broken(str(error))
            raise
        except BaseException as error:
            logger.error("the engine has failed", exc_info=error)
            self._mark_broken(f"the engine failed with {type(error).__name__}: the log says why")

    def _serve(self) -> None:
        while True:
            with self._wake:
                if not self.busy:
                    self._tell_all()
                    if self.state != "healthy" and not self.queue:
                        return
                self._wake.wait_for(lambda: self.queue or self.state != "healthy" or self.busy)
                for slot, request in running(self.slots):
                    if request.cancelled:
                        self._leave(slot, request, request.cancelled)
                        self._share(slot)
                self._grow()
                self._admit()
            if batch := self._plan():
                self._step(batch)
            elif self.busy:
                self._tell_all()
                time.sleep(0.002)  # until a grammar knows what may come next

    def _grow(self) -> None:
        """Give running answers room for their next tokens, all at once.

        Where a pool has no more, its youngest request goes back to the front of the queue, to go on
        from its text so far.
        """
        full = [pair for pair in running(self.slots) if len(pair[0].tokens) > pair[0].room]
        for slot, _ in sorted(full, key=by_age):
            while slot.request and not (
                self._reserve(slot, slot.request.ahead) or self._resize(slot, len(slot.tokens))
            ):
                youngest, request = max(running(slot.pool), key=by_age)
                self.queue.appendleft(request)
                youngest.request = None
                self._keep(youngest, 0)
        for slot, request in running(self.slots) if full else ():
            self._resize(slot, request.ahead)

    def _admit(self) -> None:
        """Give free slots to the oldest requests, while the engine has room for them."""
        while self.queue and self.busy < len(self.slots) and self._place(self.queue[0]):
            self.queue.popleft()

    def _place(self, request: Request) -> bool:
        """Give a request a slot, best in the pool that holds most of its prompt, idle or busy; of
        equal pools, in the emptiest. False: there is no room.
        """
        common = {slot: self._common(request, slot) for slot in self.slots}

        def rank(pool: list[Slot]) -> tuple[int, int]:
            return -max(common[slot] for slot in pool), sum(slot.room for slot in pool)

        return any(self._fit(request, pool, common) for pool in sorted(self._pools, key=rank))

    def _align(self, count: int) -> int:
        """The last position up to this one at which a prompt can go on."""
        return count // self._engine.resume_align * self._engine.resume_align

    def _common(self, request: Request, slot: Slot) -> int:
        """How many tokens of a request the slot holds, for it to go on from.

        A token whose logits are needed does not count.
        """
        if request.scoring or not self._engine.prompt_chunk:
            return 0
        most = min(slot.held, len(request.tokens) - 1)
        return self._align(common_prefix(request.tokens, slot.tokens, most))

    def _fit(self, request: Request, pool: list[Slot], common: Mapping[Slot, int]) -> bool:
        """Give a request a slot of this pool, and what is held there of its prompt. False: there is
        no slot, or no room.
        """

        def rank(slot: Slot) -> tuple[int, bool, float]:
            """Best is the slot with most of this prompt, unless it mostly holds another chat; then
            an empty slot; then the least recently used.
            """
            own = common[slot] if 2 * common[slot] > slot.held else 0
            return -own, bool(slot.held), slot.used

        slot = min((slot for slot in pool if not slot.request), key=rank, default=None)
        # Leave free what the others of the pool may soon need: else one would be interrupted.
        others = [other.most - slot.room for slot, other in running(pool)]
        wanted = min(request.ahead + sum(min(GROWTH, more) for more in others), self.max_seq_len)
        shared = max((common[slot] for slot, _ in running(pool)), default=0)
        free = self._engine.kv_cache_tokens // len(self._pools) - self._used(pool)
        if slot is None or wanted - shared > free:  # free, or kept by idle slots
            return False
        self._keep(slot, common[slot])
        source = max(pool, key=common.__getitem__)
        if common[source] > slot.held:
            self._copy(source, slot, common[source])
            slot.tokens = request.tokens[: slot.held]
        if not self._reserve(slot, request.ahead):
            return False
        slot.request, slot.tokens = request, request.tokens
        request.admitted = request.admitted or time.monotonic()
        if not request.first_token:
            request.cached = slot.held
        return True

    def _waits(self, slot: Slot, other: Slot) -> bool:
        """Whether a prompt waits until an older one of its pool has read what both begin with."""
        if not (slot.request and other.request and other.pending > 1 and slot.pool is other.pool):
            return False
        if slot.request.scoring or other.request.submitted >= slot.request.submitted:
            return False
        now = max(slot.held, self._align(other.held))  # what it can go on from already
        # Waiting pays for so many more tokens, or for the last that can be shared.
        end = min(now + max(self._engine.resume_align, 16), self._align(len(slot.tokens) - 1))
        return end > now and slot.tokens[:end] == other.tokens[:end]

    def _share(self, source: Slot) -> None:
        """Copy what a slot holds to the prompts that waited for it."""
        for slot in source.pool:
            if slot.request and slot.pending > 1 and slot.held < source.held:
                common = self._common(slot.request, source)
                if common > slot.held and not self._waits(slot, source):
                    if not slot.request.first_token:
                        slot.request.cached += common - slot.held
                    self._copy(source, slot, common)

    def _plan(self) -> list[Work]:
        """The next step: the last token of every running answer, then the oldest prompts within the
        budget.
        """
        busy = running(self.slots)
        batch = [
            Work(slot.index, slot.tokens[-1:].tolist(), slot.held, request.sampler)
            for slot, request in busy
            if slot.pending == 1 and (not request.late or request.sampler.ready)
        ]
        prompts = [pair for pair in busy if pair[0].pending > 1]
        answers = len(batch)
        chunk = self._engine.prompt_chunk
        # in bfloat16, cuts at multiples of 16 do not change the logits
        align = max(self._engine.resume_align, 16)
        few = max(self.PROMPT_BUDGET + answers, align)
        budget = (chunk or self.PROMPTS_BUDGET) if len(prompts) > answers else few
        for slot, request in sorted(prompts, key=by_age):
            if chunk and any(self._waits(slot, other) for other, _ in prompts):
                continue
            if request.scoring and answers:
                budget = min(budget, self.SCORES_BUDGET)
            end = len(slot.tokens)
            if chunk and slot.pending > budget:
                end = (slot.held + budget) // align * align
            if end <= slot.held or budget <= 0:
                break
            # a card pads shorter ones to that
            budget -= max(end - slot.held, self._engine.resume_align)
            tokens = slot.tokens[slot.held : end].tolist()
            sampler = request.sampler if end == len(slot.tokens) else None
            following = slot.tokens[slot.held + 1 : end + 1] if request.scoring else ()
            scores = Scores(list(following), request.sampler.params.logprobs or 0)
            batch.append(Work(slot.index, tokens, slot.held, sampler, scores))
        return batch

    def _step(self, batch: list[Work]) -> None:
        """Run one step. If it fails, its requests fail, and all others go on."""
        self._step_began = time.monotonic()
        slots = running(self.slots[work.slot] for work in batch)
        try:
            results = self._engine.step(batch, self._tell_all)
        except Exception as error:
            logger.error("the engine failed on a step of %d requests", len(batch), exc_info=error)
            for slot, request in slots:
                self._leave(slot, request, "error")
            self._failures += 1
            if self._failures >= self.FAILURES:
                self._mark_broken(
                    f"{self._failures} steps in a row failed, the last with {type(error).__name__}"
                )
            return
        finally:
            self._step_began = math.inf
        for work, result, (slot, request) in zip(batch, results, slots):
            slot.held += len(work.tokens)
            # after an interruption they come again
            for token in result.scores[max(request.told - work.position, 0) :]:
                self._tell(request, "prompt", token)
                request.told += 1
            if work.sampler:
                self._take(slot, request, result.token)
        for work in batch:
            if len(work.tokens) > 1:
                self._share(self.slots[work.slot])

    def _take(self, slot: Slot, request: Request, token: Token | None) -> None:
        """Add the next token to an answer, and end the answer if it is complete."""
        request.late = token is None
        if request.sampler.error:
            self._leave(slot, request, "error")
        elif token is None:
            slot.held -= 1  # the last token goes into a later step again
        else:
            now = time.monotonic()
            if request.generated:
                self.statistics.observe("inter_token_latency_seconds", now - request.last_token)
            request.first_token, request.last_token = request.first_token or now, now
            if not request.max_tokens:
                self._leave(slot, request, "length")
            elif token.id in request.stop_tokens:
                self._leave(slot, request, "stop", None if token.id == END else token)
            else:
                request.tokens.append(token.id)  # the slot's, too
                request.sampler.push(token.id)
                self._tell(request, "token", token)
                if request.generated >= request.max_tokens:
                    self._leave(slot, request, "length")

    def _leave(self, slot: Slot, request: Request, outcome: str, last: Token | None = None) -> None:
        """End the slot's request. `last` is the stop token."""
        # Only a whole answer shows that steps succeed: a card may fail at each decode, at no prefill.
        if outcome in ("stop", "length"):
            self._failures = 0
        self._finish(request, outcome, last)
        slot.request, slot.used = None, time.monotonic()
        # After an error the slot's KV cache cannot be trusted.
        self._keep(slot, slot.held if self._engine.prompt_chunk and outcome != "error" else 0)

    def _keep(self, slot: Slot, held: int) -> None:
        """Keep `held` tokens of an idle slot for a request that starts with them, and give back the
        other room.
        """
        slot.held, slot.tokens = held, slot.tokens[:held]
        self._resize(slot, held)

    def _copy(self, source: Slot, slot: Slot, length: int) -> None:
        """Let a slot hold what another one of its pool holds."""
        self._engine.copy(source.index, slot.index, length)
        slot.held, slot.room = length, max(slot.room, length)

    def _resize(self, slot: Slot, length: int) -> bool:
        """Give a slot this room. False: its pool has no more."""
        if length != slot.room and not self._engine.reserve(slot.index, length):
            return False
        slot.room = length
        return True

    def _reserve(self, slot: Slot, length: int) -> bool:
        """Give a slot this room. Idle slots of its pool give up what they keep for it, the least
        recently used first.
        """
        idle = [other for other in slot.pool if not other.request and other is not slot]
        idle.sort(key=lambda other: other.used)
        while not self._resize(slot, length):
            if not idle:
                return False
            self._keep(idle.pop(0), 0)
        return True

    def _mark_broken(self, error: str) -> None:
        """The engine cannot go on: end all requests."""
        with self._wake:
            self._error = self._error or error
            for request in self._in_flight():
                self._finish(request, "error")
            self._tell_all()
            self.queue.clear()
            for slot in self.slots:  # without reserve(): the engine may be closed
                slot.request = None


# ==================================================================================================
# Fields
# ==================================================================================================

# What a field must be, in words, and the test for it; and perhaps what reads it: a function of the
# value, its place, and whether the check is strict.
Check = tuple[Any, ...]
# a field's name to its default, or ... if it is required, and its check
Table = Mapping[str, tuple[Any, Check]]


@dataclass
class Kinds:
    """The fields of an object of several kinds, of which the field `name` says one."""

    name: str
    tables: Mapping[str, Table]
    default: Any = ...


def object_of(table: Table | Kinds) -> Check:
    """An object with these fields."""
    return *OBJECT, lambda v, where, strict: check(v, table, where, strict)


def list_of(table: Table | Kinds, must: Check) -> Check:
    """A list of such objects, or a text that stands for one."""
    return *must, lambda v, where, strict: [
        check(item, table, f"{where}[{i}]", strict)
        for i, item in enumerate(v if isinstance(v, list) else [{"text": v}])
    ]


def of_type(must: str, *types: type) -> Check:
    """A value of one of these types."""
    return must, lambda v: type(v) in types


def whole_from(low: int, high: float = math.inf) -> Check:
    """A whole number from low to high."""
    must = f"a whole number from {low}" + (f" to {high}" if high < math.inf else "")
    return must, lambda v: type(v) is int and low <= v <= high


def number(low: float, high: float) -> Check:
    """Any number from low to high."""
    return f"a number from {low} to {high}", lambda v: type(v) in (int, float) and low <= v <= high


def one_of(names: Iterable[str]) -> Check:
    """A string that is one of these."""
    return f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names


def are_ids(value: Any) -> bool:
    """Whether the value is a list of token ids."""
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def are_texts(value: Any) -> bool:
    """Whether the value is a list of strings, none of them empty."""
    return isinstance(value, list) and all(isinstance(text, str) and text != "" for text in value)


def prompts(value: Any) -> list[str | list[int]]:
    """The prompts, text or token ids, of a field that holds one or a list of them; [] if it holds
    anything else.
    """
    several = value if isinstance(value, list) and not are_ids(value) else [value]
    fits = len(several) <= 64 and all(
        prompt and (isinstance(prompt, str) or are_ids(prompt)) for prompt in several
    )
    return several if fits else []


FLAG = of_type("true or false", bool)
TEXT = of_type("a string", str)
NONEMPTY: Check = "a string that is not empty", lambda v: isinstance(v, str) and v != ""
OBJECT = of_type("an object", dict)
LIST = of_type("a list", list)
IDS: Check = "a list of token ids", are_ids
LIMIT: Check = (
    "a whole number from 1, or -1 for no limit",
    lambda v: type(v) is int and (v == -1 or v >= 1),
)
LIMIT_OR_0: Check = "a whole number from 0, or -1 for no limit", whole_from(-1)[1]
SEED: Check = "a whole number that fits in 64 bits", whole_from(-(2**63), 2**64 - 1)[1]
PENALTY = number(-2, 2)
STOP: Check = (
    "a string or a list of up to 16 strings, none of them empty",
    lambda v: len(as_list(v)) <= 16 and are_texts(as_list(v)),
)
BIAS = number(-100, 100)
BIASES: Check = (
    f"an object of token ids, each with {BIAS[0]}",
    lambda v: (
        isinstance(v, dict)
        and all(re.fullmatch("[0-9]{1,9}", key) and BIAS[1](bias) for key, bias in v.items())
    ),
    lambda v, where, strict: {int(token): bias for token, bias in v.items()},
)
LIKELY = whole_from(0, 20)
LOGPROBS: Check = LIKELY[0], lambda v: v is False or LIKELY[1](v)
PROMPT: Check = (
    "a string or a list of token ids, not empty, or a list of up to 64 of them",
    lambda v: bool(prompts(v)),
)
MESSAGES: Check = (
    'a list of at least one {"role": ..., "content": ...}',
    lambda v: isinstance(v, list) and bool(v),
)
CONTENT = of_type("a string or a list of text parts", str, list)
TEXT_PART: Table = {"text": (..., TEXT)}
PART = Kinds(
    "type",
    {
        **dict.fromkeys(
            ("text", "input_text", "output_text", "summary_text", "reasoning_text"), TEXT_PART
        ),
        "refusal": {"refusal": (..., TEXT)},  # a part of an earlier answer
    },
    "text",
)
PARTS = list_of(PART, CONTENT)
TEXTS: Check = (
    *CONTENT,
    lambda v, where, strict: "".join(
        part["refusal" if part["type"] == "refusal" else "text"]
        for part in PARTS[2](v, where, strict)
    ),
)

TYPE: Check = '"function"', lambda v: v == "function"
TOOL: Table = {"type": (..., TYPE), "function": (..., OBJECT)}
NAMED: Table = {"name": (..., NONEMPTY)}
FUNCTION: Table = {
    **NAMED,
    "parameters": ({"type": "object", "additionalProperties": False}, OBJECT),
    "strict": (False, FLAG),
}
CALL_ID: Check = *TEXT, lambda v, where, strict: short_id(v)
ARGUMENTS: Check = (
    "a JSON object in a string",
    lambda v: isinstance(v, str) and json_object(v) is not None,
    lambda v, where, strict: json_object(v),
)
CALLED: Table = {**NAMED, "arguments": (..., ARGUMENTS)}
CALL: Table = {
    "id": (..., CALL_ID),
    "type": ("function", TYPE),
    "function": (..., object_of(CALLED)),
}

# The fields of messages, by role.
MESSAGE: Table = {"content": (..., TEXTS)}
ASSISTANT: Table = {
    "content": ("", TEXTS),
    "reasoning_content": ("", TEXT),
    "tool_calls": ([], list_of(CALL, LIST)),
}
TOOL_RESULT: Table = {**MESSAGE, "tool_call_id": (..., CALL_ID)}
CHAT_MESSAGE = Kinds("role", dict.fromkeys(("system", "developer", "user", "assistant"), MESSAGE))
OPENAI_MESSAGE = Kinds("role", {**CHAT_MESSAGE.tables, "assistant": ASSISTANT, "tool": TOOL_RESULT})

CHOICE: Check = (
    'none, auto, required or {"type": "function", "function": {"name": ...}}',
    lambda v: v in ("none", "auto", "required") or isinstance(v, dict),
)
SCHEMA: Table = {"schema": (..., OBJECT), "strict": (False, FLAG)}
ANSWER_FORMATS: dict[str, Table] = {
    "text": {},
    "json_object": {"schema": ({"type": "object"}, OBJECT)},  # llama.cpp's
    "json_schema": {"json_schema": (..., object_of(SCHEMA))},
}
RESPONSE_FORMAT = Kinds("type", ANSWER_FORMATS)
FLAT_FORMAT = Kinds("type", {**ANSWER_FORMATS, "json_schema": SCHEMA})
STRUCTURED_OUTPUTS: Table = {  # vLLM's
    "json": (None, OBJECT),
    "json_object": (None, FLAG),
    "regex": (None, NONEMPTY),
    "choice": (None, ("a list of strings", lambda v: are_texts(v) and v != [])),
    "grammar": (None, NONEMPTY),
}
SWITCH = of_type("true, false or a level", bool, str)
THINKING: Table = {  # the names that clients have for the one switch that templates have
    "chat_template_kwargs": ({}, OBJECT),
    "enable_thinking": (None, SWITCH),
    "think": (None, SWITCH),
    "reasoning_effort": (None, TEXT),
    "reasoning": ({}, OBJECT),
}

SAMPLING: Table = {  # of every dialect; a default of None is the model's own
    "temperature": (None, number(0, 2)),
    "top_p": (None, number(0, 1)),
    "top_k": (None, whole_from(-1)),
    "seed": (None, SEED),
    "stop": ([], STOP),
    "stream": (False, FLAG),
}
CHAT: Table = {  # POST /chat
    "prompt": (None, NONEMPTY),
    "messages": (None, list_of(CHAT_MESSAGE, MESSAGES)),
    "system": (None, TEXT),
    "max_tokens": (128, whole_from(1)),
    **THINKING,
    **SAMPLING,
}
STREAM_OPTIONS: Table = {
    "include_usage": (False, FLAG),
    "continuous_usage_stats": (False, FLAG),  # vLLM's
}
OPENAI: Table = {  # what OpenAI's dialects have in common
    "model": (None, TEXT),
    **SAMPLING,
    "stream_options": ({}, object_of(STREAM_OPTIONS)),
    "ignore_eos": (False, FLAG),  # vLLM's, for benchmarks: generate max_tokens tokens
    "stop_token_ids": ([], IDS),
    "logit_bias": ({}, BIASES),
    "min_tokens": (0, whole_from(0)),
    "min_p": (None, number(0, 1)),
    "repetition_penalty": (None, number(0.01, 100)),
    "frequency_penalty": (0, PENALTY),
    "presence_penalty": (0, PENALTY),
    "structured_outputs": ({}, object_of(STRUCTURED_OUTPUTS)),
}
CHAT_COMPLETIONS: Table = {
    "messages": (..., list_of(OPENAI_MESSAGE, MESSAGES)),
    "max_tokens": (None, LIMIT),  # LM Studio and llama.cpp have -1
    "max_completion_tokens": (None, LIMIT),
    "n": (1, whole_from(1, 16)),
    "response_format": ({"type": "text"}, object_of(RESPONSE_FORMAT)),
    **THINKING,
    **OPENAI,
    "logprobs": (None, FLAG),
    "top_logprobs": (0, LIKELY),
    "tools": ([], list_of(TOOL, LIST)),
    "tool_choice": ("auto", CHOICE),
    "parallel_tool_calls": (True, FLAG),
    "add_generation_prompt": (None, FLAG),
    "continue_final_message": (False, FLAG),
}
COMPLETIONS: Table = {
    "prompt": (..., PROMPT),
    **OPENAI,
    "max_tokens": (16, LIMIT_OR_0),  # OpenAI's default
    "n": (1, whole_from(1, 16)),
    "response_format": ({"type": "text"}, object_of(RESPONSE_FORMAT)),
    "logprobs": (None, LOGPROBS),
    "echo": (False, FLAG),
    "add_special_tokens": (True, FLAG),
}
LEFT_OUT: Check = "left out here", lambda v: False
RESPONSES: Table = {
    # of other dialects; and OpenAI keeps prompts for its users
    **dict.fromkeys(("max_tokens", "messages", "prompt"), (None, LEFT_OUT)),
    "input": (
        ...,
        (
            "a string or a list of items, not empty",
            lambda v: isinstance(v, (str, list)) and bool(v),
        ),
    ),
    "instructions": (None, TEXT),
    "max_output_tokens": (None, LIMIT),
    "metadata": ({}, OBJECT),
    "previous_response_id": (None, TEXT),
    "store": (True, FLAG),
    "text": ({}, object_of({"format": ({"type": "text"}, OBJECT)})),
    "truncation": ("disabled", one_of(("disabled", "auto"))),
    "tools": ([], LIST),
    "tool_choice": (
        "auto",
        ('none, auto, required or {"type": "function", "name": ...}', CHOICE[1]),
    ),
    "parallel_tool_calls": (True, FLAG),
    "include": ([], LIST),
    "logprobs": (None, FLAG),
    "top_logprobs": (0, LIKELY),
    **dict.fromkeys(("prompt_cache_key", "safety_identifier"), (None, TEXT)),  # repeated
    **THINKING,
    **OPENAI,
}
RESPONSE_TOOL: Table = {"type": (..., TYPE), "description": (None, TEXT), **FUNCTION}
ITEM = Kinds(  # of a response's input
    "type",
    {
        "message": {"role": (..., one_of(CHAT_MESSAGE.tables)), **MESSAGE},
        "reasoning": {"summary": ("", TEXTS), "content": ("", TEXTS)},
        "function_call": {"call_id": (..., CALL_ID), **CALLED},
        "function_call_output": {"call_id": (..., CALL_ID), "output": (..., TEXTS)},
    },
    "message",
)

PARALLEL: Table = {"disable_parallel_tool_use": (False, FLAG)}
ANTHROPIC_CHOICE = Kinds(
    "type",
    {**dict.fromkeys(("auto", "any", "none"), PARALLEL), "tool": {**NAMED, **PARALLEL}},
)
ANTHROPIC_THINKING: Table = {"type": (..., one_of(("enabled", "adaptive", "disabled")))}
CONTENT_BLOCK = Kinds(  # of a message's content
    "type",
    {
        "text": TEXT_PART,
        "thinking": {"thinking": (..., TEXT)},
        "redacted_thinking": {},
        "tool_use": {"id": (..., CALL_ID), **NAMED, "input": (..., OBJECT)},
        "tool_result": {"tool_use_id": (..., CALL_ID), "content": ("", TEXTS)},
    },
    "text",
)
SYSTEM_BLOCK = Kinds("type", {"text": TEXT_PART}, "text")
TURN: Table = {
    "role": (..., one_of(("user", "assistant", "system"))),
    "content": (..., list_of(CONTENT_BLOCK, CONTENT)),
}
ANTHROPIC_MESSAGES: Table = {
    "model": (None, TEXT),
    "messages": (..., list_of(TURN, MESSAGES)),
    "max_tokens": (None, whole_from(1)),
    "system": ("", list_of(SYSTEM_BLOCK, CONTENT)),
    "stop_sequences": ([], STOP),
    **SAMPLING,
    "tools": ([], LIST),
    "tool_choice": ({"type": "auto"}, object_of(ANTHROPIC_CHOICE)),
    "thinking": ({"type": "disabled"}, object_of(ANTHROPIC_THINKING)),
    "output_config": ({}, object_of({"format": (None, object_of(FLAT_FORMAT))})),
    "output_format": (None, object_of(FLAT_FORMAT)),  # of older clients, for output_config.format
}
ANTHROPIC_TOOL: Table = {
    **NAMED,
    "description": (None, TEXT),
    "input_schema": (..., OBJECT),
    "strict": (False, FLAG),
}

# Fields of OpenAI, vLLM and llama.cpp that would change the answer and are not supported, at any
# level, with the values that ask for nothing.
UNSUPPORTED: dict[str, Sequence[Any]] = {
    **dict.fromkeys(
        (
            "allowed_token_ids",
            "audio",
            "chat_template",
            "conversation",
            "ebnf",
            "guided_choice",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "json_schema",
            "mcp_servers",
            "n_predict",
            "prompt_logprobs",
            "regex",
            "structural_tag",
            "thread",
            "truncate_prompt_tokens",
            "web_search_options",
        ),
        (),
    ),
    **dict.fromkeys(
        (
            "add_special_tokens",
            "background",
            "bad_words",
            "chat_template_kwargs",
            "documents",
            "dry_multiplier",
            "echo",
            "functions",
            "grammar",
            "include_stop_str_in_output",
            "mirostat",
            "mirostat_mode",
            "return_token_ids",
            "stop_regex",
            "suffix",
            "top_logprobs",
            "use_beam_search",
            "xtc_probability",
        ),
        (False, 0, "", [], {}),
    ),
    "best_of": [1],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "n": [1],
    "repeat_penalty": [1],
    "response_format": [{"type": "text"}],
    "skip_special_tokens": [True],
    "typical_p": [1],
}


def refuse_unknown(path: str, name: str, table: Table) -> NoReturn:
    """Suggest the nearest field."""
    near = [known for known in table if known.startswith(name)] or difflib.get_close_matches(
        name, table, 1
    )
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(table)}"
    raise ApiError(400, f"unknown field {printable(path)}: {hint}", printable(path))


def check(body: Any, table: Table | Kinds, where: str = "", strict: bool = False) -> dict[str, Any]:
    """Check a JSON object and fill in the defaults; null counts as absent. Raises ApiError.

    A strict check refuses every unknown field, as POST /chat is our own API. In other APIs other
    people's programs choose the fields: only what would change the answer is refused.
    """
    if not isinstance(body, dict):
        raise ApiError(
            400, f"{where or 'the body'} must be a JSON object, not {shown(body)}", where or None
        )
    if isinstance(table, Kinds):
        kinds: Table = {table.name: (table.default, one_of(table.tables))}
        kind = check({table.name: body.get(table.name)}, kinds, where)[table.name]
        table = {**kinds, **table.tables[kind]}
    prefix = f"{where}." if where else ""
    for name, value in body.items():
        if name not in table and value is not None:
            path = f"{prefix}{name}"
            if strict:
                refuse_unknown(path, name, table)
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                known = name == "conversation" and "previous_response_id" in table
                cure = "send previous_response_id" if known else "leave it out"
                message = f"{path} is not supported here: {cure}"
                raise ApiError(400, message, path, "unsupported_parameter")
    fields = {}
    for name, (default, rule) in table.items():
        value, path = body.get(name), f"{prefix}{name}"
        must, fits, *read = rule
        if value is None:
            if default is ...:
                raise ApiError(400, f"{path} is missing: it must be {must}", path)
            value = default
        elif not fits(value):
            raise ApiError(400, f"{path} must be {must}, not {shown(value)}", path)
        fields[name] = read[0](value, path, strict) if read and value is not None else value
    return fields


def json_object(text: str) -> dict[str, Any] | None:
    """The object in a text of JSON; None if there is none. No text counts as an empty object."""
    with contextlib.suppress(ValueError):
        value = from_json(text or "{}")
        return value if isinstance(value, dict) else None
    return None


# ==================================================================================================
# Requests
# ==================================================================================================


@dataclass
class Asked:
    """What a body asks for, in no dialect's words. Every default is filled in."""

    messages: list[Message] = field(default_factory=list)  # a conversation; or
    prompts: Sequence[str | list[int]] | None = None  # plain texts, or token ids
    special_tokens: bool = True  # those that begin a plain text
    starts: bool = True  # the prompt ends with what an answer of the assistant begins with
    begun: str = ""  # the start of the answer, which the model continues
    tools: list[Message] = field(default_factory=list)  # for the chat template
    functions: Sequence[Function] = ()  # that may be called
    forced: bool = False  # a call must come
    several: bool = True  # calls may come
    form: Form | None = None  # of the answer
    thinks: bool = False  # the template's enable_thinking
    limit: int | None = None  # tokens of the answer; None: the rest of the context
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: Sequence[str] = ()
    stop_tokens: frozenset[int] = frozenset()  # beside the model's own
    ignore_eos: bool = False  # the model's own do not end the answer
    n: int = 1  # answers to each prompt
    echo: bool = False  # the prompt comes before the answer
    stream: bool = False
    usage: bool = False  # a stream ends with it
    usage_so_far: bool = False  # every chunk of a stream has it
    # what the answer repeats: /chat's prompt, the name of the model in /v1/messages, or a response's
    # fields in JSON
    said: str = ""
    history: bytes | None = None  # a response's items as KeptItems has them, to be kept
    prompt_name: str = "messages"  # the field that has the prompt, for errors


MAX_BODY = 2 << 20  # bytes of a body, or of what it refers to: several times the longest context


class KeptItems:
    """Items of /v1/responses for later requests that refer to them: those of a conversation up to
    an answer, by the answer's id, and those of answers, each by its own.

    They are kept in memory for an hour, and the oldest go when they take more than 64 MB.
    """

    SECONDS, BYTES = 3600, 64 << 20

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, bytes]] = {}  # the time, and items, one a line
        self._size = 0
        self._lock = threading.Lock()

    def keep(self, identity: str, items: bytes) -> None:
        with self._lock:
            self._kept[identity] = (time.monotonic(), items)
            self._size += len(items)
            self._drop_old()

    def find(self, identity: str, where: str) -> bytes:
        """Raises ApiError if it is not here."""
        with self._lock:
            self._drop_old()
            if identity in self._kept:
                return self._kept[identity][1]
        cure = "answers are kept for an hour: send the whole conversation as input"
        raise ApiError(400, f"there is no {printable(identity)} here, {cure}", where)

    def _drop_old(self) -> None:
        while self._kept:
            identity, (kept, items) = next(iter(self._kept.items()))
            if self._size <= self.BYTES and time.monotonic() - kept <= self.SECONDS:
                return
            self._size -= len(items)
            del self._kept[identity]


class Model(NamedTuple):
    """What requests need to know of the model that is served."""

    name: str
    tokenizer: Tokenizer
    grammars: Grammars
    defaults: Mapping[str, float]  # of the sampling, by the checkpoint
    max_seq_len: int
    scores_prompts: bool
    kept: KeptItems


# A reader for each dialect: JSON to what it asks for. Each raises ApiError.


def read_chat(body: Any, model: Model) -> Asked:
    """The body of POST /chat."""
    fields = check(body, CHAT, strict=True)
    messages, prompt = fields["messages"], fields["prompt"]
    if messages and prompt:
        raise ApiError(400, "send prompt or messages, not both")
    if not messages and not prompt:
        example = '{"prompt": "Hello!"}'
        raise ApiError(400, f"send prompt, a string, or messages, a list: for example {example}")
    chat = list(map(read_message, messages or [{"role": "user", "content": prompt}]))
    said = chat[-1]["content"]
    if fields["system"] is not None:
        chat.insert(0, {"role": "system", "content": fields["system"]})
    return read_common(
        fields,
        model._replace(defaults={"temperature": 0.7, "top_p": 0.9}),
        messages=chat,
        said=said,
        prompt_name="prompt" if prompt else "messages",
    )


def read_chat_completions(body: Any, model: Model) -> Asked:
    """The body of POST /v1/chat/completions:
    https://platform.openai.com/docs/api-reference/chat/create
    """
    fields = check(body, CHAT_COMPLETIONS)
    likely, begins = fields["top_logprobs"], fields["add_generation_prompt"]
    chat = list(map(read_message, fields["messages"]))
    continues = fields["continue_final_message"]
    if begins and continues:
        name = "add_generation_prompt"
        raise ApiError(
            400, f"{name} does not go with continue_final_message: leave one of them out", name
        )
    if continues and chat[-1]["role"] != "assistant":
        raise ApiError(
            400, "continue_final_message needs a last message of the assistant", "messages"
        )
    choice = fields["tool_choice"]
    if isinstance(choice, dict):
        table: Table = {"type": (..., TYPE), "function": (..., object_of(NAMED))}
        choice = check(choice, table, "tool_choice")["function"]
    tools = [(f"tools[{i}].function", tool["function"]) for i, tool in enumerate(fields["tools"])]
    return read_common(
        {
            **fields,
            "max_tokens": fields["max_completion_tokens"] or fields["max_tokens"],
            "logprobs": likely if likely or fields["logprobs"] else None,
            "tools": tools,
            "tool_choice": choice,
        },
        model,
        begun=chat.pop()["content"] if continues else "",
        messages=chat,
        starts=continues or begins is not False,
    )


def read_completions(body: Any, model: Model) -> Asked:
    """The body of POST /v1/completions: the model continues a plain text, without a chat format."""
    fields = check(body, COMPLETIONS)
    if fields["logprobs"] is False:
        fields["logprobs"] = None
    return read_common(
        fields,
        model,
        prompts=prompts(fields["prompt"]),
        special_tokens=fields["add_special_tokens"],
        echo=fields["echo"],
        prompt_name="prompt",
    )


def read_responses(body: Any, model: Model) -> Asked:
    """The body of POST /v1/responses: https://platform.openai.com/docs/api-reference/responses"""
    fields = check(body, RESPONSES)
    tools = [
        (f"tools[{i}]", tool)
        for i, tool in enumerate(fields["tools"])
        # codex sends these to every model, and works without them
        if not isinstance(tool, dict) or tool.get("type") not in ("namespace", "web_search")
    ]
    said = {name: fields[name] for name in REPEATED}
    said["tools"] = [{**check(tool, RESPONSE_TOOL, where), **tool} for where, tool in tools]
    likely = fields["top_logprobs"]
    scored = likely or fields["logprobs"] or "message.output_text.logprobs" in fields["include"]
    choice = fields["tool_choice"]
    if isinstance(choice, dict):
        choice = check(choice, {"type": (..., TYPE), **NAMED}, "tool_choice")
    asked = read_common(
        {
            **fields,
            "max_tokens": fields["max_output_tokens"],
            "logprobs": likely if scored else None,
            "response_format": check(fields["text"]["format"], FLAT_FORMAT, "text.format"),
            "tools": tools,
            "tool_choice": choice,
        },
        model,
    )
    asked.history, chat = read_history(fields, model.kept)
    if fields["instructions"]:
        chat.insert(0, {"role": "system", "content": fields["instructions"]})
    asked.messages = joined(chat)
    asked.prompt_name = "input"
    said["temperature"], said["top_p"] = asked.sampling.temperature, asked.sampling.top_p
    said["reasoning"] = {
        "effort": fields["reasoning_effort"], "summary": None, **fields["reasoning"]
    }  # fmt: skip
    asked.said = long_json(said).decode()
    return asked


def read_anthropic(body: Any, model: Model) -> Asked:
    """The body of POST /v1/messages: https://platform.claude.com/docs/en/api/messages

    The model's name is not checked, as Claude Code asks for Anthropic's own, but repeated: it sends
    back the thinking of no other.
    """
    fields = check(body, ANTHROPIC_MESSAGES)
    form = fields["output_config"]["format"] or fields["output_format"] or {"type": "text"}
    choice = fields["tool_choice"]
    tools = [
        (f"tools[{i}]", read_anthropic_tool(tool, f"tools[{i}]"))
        for i, tool in enumerate(fields["tools"])
        # Anthropic runs the others, or has trained its models on them
        if not isinstance(tool, dict) or tool.get("type") in (None, "custom")
    ]
    asked = read_common(
        {
            **fields,
            "model": None,
            "stop": fields["stop_sequences"] or fields["stop"],
            "think": fields["thinking"]["type"] != "disabled",
            "response_format": {**form, "strict": True},
            "tools": tools,
            "tool_choice": {"any": "required", "tool": choice}.get(choice["type"], choice["type"]),
            "parallel_tool_calls": not choice["disable_parallel_tool_use"],
        },
        model,
    )
    asked.messages = read_turns(fields["system"], fields["messages"])
    asked.said = fields["model"] or model.name
    last = asked.messages[-1] if asked.messages else {}
    if last.get("role") == "assistant" and last.keys() == {"role", "content"}:
        asked.begun = asked.messages.pop()["content"]  # the answer continues it
    return asked


def read_anthropic_tool(tool: Any, where: str) -> dict[str, Any]:
    """A tool as OpenAI's dialects have it."""
    fields = check(tool, ANTHROPIC_TOOL, where)
    return {"parameters": fields.pop("input_schema"), **fields}


# Claude Code's first words to the model, which are new with every request: with them in the prompt
# nothing of it could be reused.
BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")


def read_turns(system: list[Message], turns: list[Message]) -> list[Message]:
    """Anthropic's messages for the chat template."""
    chat: list[Message] = []
    for block in system:
        if text := BILLING.sub("", block["text"]):
            chat.append({"role": "system", "content": text})
    for turn in turns:
        chat += [read_block(block, turn["role"]) for block in turn["content"]]
    return joined(chat)


def read_block(block: dict[str, Any], role: str) -> Message:
    """A block as a message of its own."""
    kind = block["type"]
    if kind == "tool_result":
        return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": block["content"]}
    if kind == "tool_use":
        call = tool_call(block["id"], block["name"], block["input"])
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "text":
        # a system message amid the others, which some templates refuse
        return {"role": "assistant" if role == "assistant" else "user", "content": block["text"]}
    return {"role": role, "reasoning_content": block.get("thinking")}


# What readers have in common.

# what a body of POST /v1/chat/completions says with no more than messages
UNSAID = check({"messages": [{"role": "user", "content": ""}]}, CHAT_COMPLETIONS)


def read_common(given: dict[str, Any], model: Model, **more: Any) -> Asked:
    """What a body asks for. `given` says it in the words of chat completions; `more` has what they
    have no words for, as Asked names it.
    """
    fields = {**UNSAID, **given}
    check_model(fields["model"] or model.name, model.name)
    options = fields["stream_options"]
    model.tokenizer.check_tokens(fields["stop_token_ids"], "stop_token_ids")
    model.tokenizer.check_tokens(fields["logit_bias"], "logit_bias")
    asked = Asked(
        form=read_form(fields),
        thinks=read_thinking(fields, model),
        limit=fields["max_tokens"],
        sampling=read_sampling(fields, model.defaults),
        stop=as_list(fields["stop"]),
        stop_tokens=frozenset(fields["stop_token_ids"]),
        ignore_eos=fields["ignore_eos"],
        n=fields["n"],
        stream=fields["stream"],
        usage=options["include_usage"],
        usage_so_far=options["include_usage"] and options["continuous_usage_stats"],
        **more,
    )
    read_tools(asked, fields, model)
    if fields["min_tokens"] and (asked.functions or asked.form):
        cure = "min_tokens does not go with tools or a response format: leave it out"
        raise ApiError(400, cure, "min_tokens")
    return asked


def read_sampling(fields: dict[str, Any], defaults: Mapping[str, float]) -> SamplingParams:
    """How the tokens are drawn: by the body, or else by the model's own defaults."""
    names = (item.name for item in dataclasses.fields(SamplingParams))
    given = {name: fields[name] for name in names if fields[name] is not None}
    given = {"top_k": 0, **defaults, **given}
    # As in vLLM and llama.cpp, -1 stands for no seed and for no top_k.
    given["top_k"] = max(0, int(given["top_k"]))
    given["seed"] = None if fields["seed"] == -1 else fields["seed"]
    return SamplingParams(**given)


def read_thinking(fields: dict[str, Any], model: Model) -> bool:
    """Whether the model is to think before it answers. Of no effect where its template has no
    switch for it, so that one configuration of a client serves all models.
    """
    switch, name = {"enable_thinking": (None, FLAG)}, "chat_template_kwargs"
    wishes = (
        check(fields[name], switch, name, strict=True)["enable_thinking"],
        fields["enable_thinking"],
        fields["think"],
        fields["reasoning_effort"],
        fields["reasoning"].get("effort"),
    )
    wish = next((wish for wish in wishes if wish is not None), False)
    return wish not in (False, "none", "") and model.tokenizer.thinks


def read_message(fields: dict[str, Any]) -> Message:
    """A message for the chat template."""
    if fields["role"] == "developer":
        fields["role"] = "system"
    return bare(fields)


def tool_call(identity: str, name: str, arguments: Any) -> Message:
    """A call of a function, as OpenAI's messages have it."""
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def read_tools(asked: Asked, fields: dict[str, Any], model: Model) -> None:
    """The functions that the model may call: `tools`, each with its place, and `tool_choice`, which
    is none, auto, required, or an object with a name.
    """
    tools, choice = fields["tools"], fields["tool_choice"]
    functions = [Function(**check(tool, FUNCTION, where)) for where, tool in tools]
    if choice == "none" or (not functions and choice == "auto"):
        return
    if "tools" not in model.tokenizer.template.source:
        raise ApiError(400, "this model's chat template has no tools: leave them out", "tools")
    if isinstance(choice, dict):
        functions = [function for function in functions if function.name == choice["name"]]
    if not functions:
        raise ApiError(
            400, "tool_choice asks for a function that is not in tools: add it there", "tool_choice"
        )
    unseen = ("type", "strict")  # by the model
    for _, tool in tools:
        function = {
            name: value for name, value in tool.items() if value is not None and name not in unseen
        }
        asked.tools.append({"type": "function", "function": function})
    asked.functions = functions
    asked.forced = choice != "auto"
    asked.several = fields["parallel_tool_calls"] and not isinstance(choice, dict)


def read_form(fields: dict[str, Any]) -> Form | None:
    """What the answer must be, by its format or structured_outputs; None: any text."""
    asked, outputs = fields["response_format"], fields["structured_outputs"]
    forms = []
    if outputs["json_object"] or asked["type"] == "json_object":
        forms.append(Form("json", asked.get("schema", {"type": "object"}), strict=False))
    for kind in ("json", "regex", "choice", "grammar"):
        if outputs[kind] is not None:
            forms.append(Form(kind, outputs[kind]))
    if asked["type"] == "json_schema":
        inner = asked.get("json_schema", asked)  # not all dialects have this level
        forms.append(Form("json", inner["schema"], inner["strict"]))
    if len(forms) > 1:
        name = "structured_outputs"
        message = f"{name} and the response format ask for several forms: send one"
        raise ApiError(400, message, name)
    return forms[0] if forms else None


REPEATED = (  # fields of a response that are those of its request
    "instructions", "max_output_tokens", "metadata", "tool_choice", "parallel_tool_calls", "store",
    "previous_response_id", "truncation", "frequency_penalty", "presence_penalty",
    "prompt_cache_key", "safety_identifier", "top_logprobs", "text",
)  # fmt: skip


def read_history(fields: dict[str, Any], kept: KeptItems) -> tuple[bytes | None, list[Message]]:
    """A response's conversation: its items, as KeptItems has them, if they are to be kept, and its
    messages. Raises ApiError.
    """
    given, previous = fields["input"], fields["previous_response_id"]
    if not isinstance(given, list):
        given = [{"role": "user", "content": given}]
    earlier = kept.find(previous, "previous_response_id") if previous else b""
    chat = [read_item(from_json(line), "previous_response_id") for line in earlier.splitlines()]
    new = []
    size = len(earlier)
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if size > MAX_BODY:
            problem = f"the items that are referred to have more than {MAX_BODY} bytes"
            raise ApiError(400, f"{problem}: begin a new conversation", where)
        items = [item]
        if isinstance(item, dict) and item.get("type") == "item_reference":
            identity = check(item, {"id": (..., TEXT)}, where)["id"]
            # earlier thinking can be missing
            found = b"" if identity.startswith("reasoning_") else kept.find(identity, f"{where}.id")
            size += len(found)
            items = [from_json(line) for line in found.splitlines()]
        new += items
        chat += [read_item(item, where) for item in items]
    return earlier + b"".join(map(long_json, new)) if fields["store"] else None, chat


def joined(messages: list[Message]) -> list[Message]:
    """The messages, those of a role in a row made one, as some templates want it."""
    runs: list[list[Message]] = []
    for message in messages:
        if runs and message["role"] == runs[-1][0]["role"] != "tool":
            runs[-1].append(message)
        else:
            runs.append([message])
    chat = []
    for run in runs:
        calls = [call for message in run for call in message.get("tool_calls", [])]
        texts = {
            name: "\n\n".join(message[name] for message in run if message.get(name))
            for name in ("content", "reasoning_content")
        }
        chat.append(bare({**run[0], **texts, "tool_calls": calls}))
    return chat


def bare(message: Message) -> Message:
    """A message without empty fields, which some templates take for full ones."""
    return {name: value for name, value in message.items() if value or name == "content"}


def read_item(item: Any, where: str) -> Message:
    """An item of a response's input as a message."""
    fields = check(item, ITEM, where)
    kind = fields.pop("type")
    if kind == "message":
        return read_message(fields)
    if kind == "function_call":
        return {
            "role": "assistant",
            "tool_calls": [tool_call(fields["call_id"], fields["name"], fields["arguments"])],
        }
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": fields["call_id"], "content": fields["output"]}
    return {"role": "assistant", "reasoning_content": fields["content"] or fields["summary"]}


def short_id(identity: str) -> str:
    """The id of a tool call in nine letters or digits, as Mistral's templates want it."""
    if re.fullmatch("[0-9A-Za-z]{9}", identity):
        return identity
    return hashlib.sha256(identity.encode(errors="replace")).hexdigest()[:9]


def check_model(name: str, served: str) -> None:
    """Raise ApiError unless `name` is the served model's. Either may be NAME or OWNER/NAME."""
    if name.rpartition("/")[2] != served.rpartition("/")[2]:
        message = (
            f"there is no model {printable(name)} here: leave the model out, or ask for {served}"
        )
        raise ApiError(404, message, "model", "model_not_found")


# From what is asked for to requests.

SCORED_ENTRIES = (
    500_000  # log-probabilities of prompts in one answer, which take about 100 bytes each
)


def prompt_tokens(asked: Asked, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each prompt. Raises ApiError."""
    if asked.prompts is None:
        tokens = tokenizer.encode_chat(asked.messages, asked.tools, asked.thinks, asked.starts)
        encoded = [tokens + tokenizer.encode_text(asked.begun)]
    else:
        encode = tokenizer.encode_document if asked.special_tokens else tokenizer.encode_text
        encoded = [
            encode(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts
        ]
    for prompt in encoded:
        tokenizer.check_tokens(prompt, asked.prompt_name)
    return encoded


def make_requests(asked: Asked, encoded: list[list[int]], model: Model) -> list[Request]:
    """The requests of a body: `n` for each prompt, whose tokens are `encoded`. Raises ApiError."""
    tokenizer = model.tokenizer
    scored = asked.echo and asked.sampling.logprobs is not None
    if scored:
        check_scores(asked, encoded, model)
    state = answer_state(asked, encoded[0], tokenizer)
    limits = [answer_limit(asked, prompt, model) for prompt in encoded]
    rules = constrain(
        tokenizer,
        model.grammars,
        asked.functions,
        asked.form,
        asked.forced,
        # Where thinking is not asked for, a grammar holds from the start.
        state if state == "thinking" or asked.thinks else "text",
    )
    new_reader = functools.partial(
        Reader,
        tokenizer,
        asked.stop,
        state,
        functions=[function.name for function in asked.functions],
        several=asked.several,
        marked=not asked.forced and resembles_call(asked.form),
        chat=asked.prompts is None,
    )
    stop_tokens = asked.stop_tokens | {END}
    if rules or not asked.ignore_eos:
        stop_tokens |= tokenizer.stop_tokens
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    requests: list[Request] = []
    for prompt, limit in zip(encoded, limits):
        for i in range(asked.n):
            sampling = asked.sampling
            if sampling.seed is not None:  # as in vLLM, the `n` answers differ
                sampling = dataclasses.replace(sampling, seed=sampling.seed + i)
            request = Request(
                prompt=prompt,
                max_tokens=limit,
                sampler=Sampler(sampling, prompt, stop_tokens, rules() if rules else None),
                stop_tokens=stop_tokens,
                reader=new_reader(),
                index=len(requests),
                scored=scored,
                events=events,
            )
            if scored:
                events.put(Event(request.index, "prompt", Token(prompt[0])))
            requests.append(request)
    return requests


def answer_limit(asked: Asked, prompt: list[int], model: Model) -> int:
    """How many tokens an answer may have. Raises ApiError if the prompt leaves no room for one."""
    if not prompt:
        raise ApiError(400, "the prompt is empty: send text", asked.prompt_name)
    context = model.max_seq_len
    if len(prompt) >= context:
        # Clients know these words, and shorten the conversation.
        message = f"prompt is too long: {len(prompt)} tokens > {context} maximum"
        name, code = asked.prompt_name, "context_length_exceeded"
        raise ApiError(400, f"{message}, which is the whole context: shorten it", name, code)
    room = context - len(prompt)
    return room if asked.limit in (None, -1) else min(asked.limit, room)


def answer_state(asked: Asked, prompt: list[int], tokenizer: Tokenizer) -> str:
    """The Reader's state at the start of the answer.

    Some chat templates end the prompt with the opening tag.
    """
    if asked.begun or asked.prompts is not None:
        return "text"
    begun = tokenizer.decode(prompt[-8:]).rstrip().endswith(tokenizer.think_tags[0].encode())
    return "thinking" if begun else "opening"


def check_scores(asked: Asked, encoded: list[list[int]], model: Model) -> None:
    """Raise ApiError if the log-probabilities of these prompts cannot be told."""
    if not model.scores_prompts:
        message = "echo with logprobs is not supported on a card: leave one of them out"
        raise ApiError(400, message, "echo", "unsupported_parameter")
    entries = sum(map(len, encoded)) * asked.n * (1 + (asked.sampling.logprobs or 0))
    if entries > SCORED_ENTRIES:
        allowed = f"and {SCORED_ENTRIES} are allowed"
        message = f"these prompts have {entries} log-probabilities, {allowed}: send fewer prompts"
        raise ApiError(400, message, "prompt")


def tokenize(body: Any, model: Model) -> dict[str, Any]:
    """The answer to vLLM's /tokenize: the ids of a text, or of a chat. Raises ApiError."""
    if isinstance(body, dict) and "prompt" in body:
        fields = check(body, {"prompt": (..., TEXT), "add_special_tokens": (True, FLAG)})
        asked = Asked(prompts=[fields["prompt"]], special_tokens=fields["add_special_tokens"])
    else:
        asked = read_chat_completions(body, model)
    (tokens,) = prompt_tokens(asked, model.tokenizer)
    return {"count": len(tokens), "max_model_len": model.max_seq_len, "tokens": tokens}


def count_tokens(body: Any, model: Model) -> dict[str, Any]:
    """The answer to POST /v1/messages/count_tokens. Raises ApiError."""
    (tokens,) = prompt_tokens(read_anthropic(body, model), model.tokenizer)
    return {"input_tokens": len(tokens)}


def detokenize(body: Any, model: Model) -> dict[str, Any]:
    """The answer to vLLM's /detokenize: the text of token ids. Raises ApiError."""
    tokens = check(body, {"tokens": (..., IDS)})["tokens"]
    model.tokenizer.check_tokens(tokens, "tokens")
    return {"prompt": model.tokenizer.decode(tokens).decode(errors="replace")}


# ==================================================================================================
# Writers
# ==================================================================================================


class Writer:
    """Writes the answers to one body, in one dialect.

    A whole answer is what its pieces add up to. The requests may wait for long, so a writer keeps
    what it needs of `asked`, and nothing of the body.
    """

    content_type = "text/event-stream"

    def begin(self) -> bytes:
        """The start of a stream, before the first piece."""
        return b""

    def add(self, request: Request, piece: Piece) -> bytes:
        """Add a piece to the answer; returns what a stream says of it."""
        raise NotImplementedError

    def close(self) -> bytes:
        """The end of a stream."""
        return b""

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed, once all pieces have been added."""
        raise NotImplementedError

    def ping(self) -> bytes:
        """What keeps a silent stream awake."""
        return b": waiting\n\n"  # a comment

    def broken(self, error: ApiError) -> bytes:
        """The end of a stream that breaks off."""
        raise NotImplementedError


def to_json(value: dict[str, Any]) -> bytes:
    """As long_json, for short values."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace") + b"\n"


def server_sent(
    value: dict[str, Any], name: str = "", encode: Callable[[Any], bytes] = to_json
) -> bytes:
    """`value` as a server-sent event."""
    event = f"event: {name}\n".encode() if name else b""
    return event + b"data: " + encode(value) + b"\n"


def plain_error(error: ApiError) -> dict[str, Any]:
    """The body of an error, in our own form."""
    return {"error": str(error)}


def openai_error(error: ApiError) -> dict[str, Any]:
    """The body of an error, in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body of an error, in Anthropic's form."""
    known = "invalid_request_error" if error.status < 500 else "api_error"
    kind = ANTHROPIC_ERRORS.get(error.status, known)
    said: dict[str, Any] = {"type": kind, "message": str(error)}
    if error.param == "thread":  # their tool runners then send the whole conversation
        refused = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        said["details"] = refused
    return {"type": "error", "error": said}


ANTHROPIC_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


class ChatWriter(Writer):
    """POST /chat: one JSON object; in a stream, one a line."""

    content_type = "application/x-ndjson"

    def __init__(self, model: Model, asked: Asked, requests: Sequence[Request]) -> None:
        self.said = asked.said
        (self.request,) = requests

    def add(self, request: Request, piece: Piece) -> bytes:
        if piece.kind == "end":
            return to_json({"done": True, **self.whole()})
        return to_json({"thinking" if piece.kind == "thinking" else "response": piece.text})

    def whole(self) -> dict[str, Any]:
        request, reader = self.request, self.request.reader
        thinking = {"thinking": reader.thinking} if reader.thinking else {}
        return {
            "success": True,
            "prompt": self.said,
            **thinking,
            "response": reader.text,
            "tokens_generated": reader.count,
            "time_seconds": round(request.seconds, 3),
            "tokens_per_second": request.speed,
            "prompt_tokens": len(request.prompt),
            "time_to_first_token_seconds": request.wait,
            "finish_reason": reader.finish,
        }

    def ping(self) -> bytes:
        return to_json({"response": ""})

    def broken(self, error: ApiError) -> bytes:
        return to_json(plain_error(error))


# What OpenAI's dialects have in common.


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def logprob_entry(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """A token's entry in a list of log-probabilities."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        name, text = spelled(tokenizer, token)
        return {"token": name, "logprob": logprob, "bytes": list(text)}

    top = [entry(*likely) for likely in token.likely]
    return {**entry(token.id, token.logprob), "top_logprobs": top}


def spelled(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """The name of a token in lists of log-probabilities, and its UTF-8."""
    text = tokenizer.decode([token])
    return text.decode(
        errors="backslashreplace"
    ) or f"token_id:{token}", text  # vLLM's, for a special token


class Choice:
    """One of OpenAI's list of choices: the answer to one request."""

    prefix = whole_object = chunk_object = ""

    def __init__(self, tokenizer: Tokenizer, asked: Asked, request: Request) -> None:
        self.tokenizer, self.request = tokenizer, request
        self.logprobs = asked.sampling.logprobs is not None
        self.entries: list[Any] = []  # of log-probabilities, one a token
        self.reason: str | None = None  # why the answer has ended

    def begin(self) -> list[dict[str, Any]]:
        return []

    def add(self, piece: Piece) -> dict[str, Any]:
        entries = self._entries(piece.tokens) if self.logprobs else []
        self.entries += entries
        if piece.kind == "end":
            called = self.request.reader.calls and piece.text == "stop"
            self.reason = "tool_calls" if called else piece.text
        return self._choice(self._delta(piece), entries)

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, content: dict[str, Any], entries: Sequence[Any] = ()) -> dict[str, Any]:
        return {
            "index": self.request.index,
            **content,
            "logprobs": self._logprobs(entries) if entries else None,
            "finish_reason": self.reason,
        }

    def _delta(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds to the answer."""
        raise NotImplementedError

    def _entries(self, tokens: Sequence[Token]) -> list[Any]:
        raise NotImplementedError

    def _logprobs(self, entries: Sequence[Any]) -> dict[str, Any]:
        raise NotImplementedError


# What a piece adds to in a chat's message. Thinking has vLLM's name and its earlier one.
CHAT_FIELDS = {
    "thinking": ("reasoning", "reasoning_content"),
    "text": ("content",),
    "end": (),
}


class ChatChoice(Choice):
    """A choice of POST /v1/chat/completions: a message."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    told = -1  # the number of the last call that a stream has begun

    def begin(self) -> list[dict[str, Any]]:
        return [self._choice({"delta": {"role": "assistant", "content": ""}})]

    def whole(self) -> dict[str, Any]:
        reader = self.request.reader
        message: dict[str, Any] = {"role": "assistant", "content": reader.text, "refusal": None}
        if reader.thinking:
            message |= dict.fromkeys(CHAT_FIELDS["thinking"], reader.thinking)
        if reader.calls:
            message["content"] = reader.text or None
            message["tool_calls"] = [
                tool_call(call.id, call.name, call.arguments) for call in reader.calls
            ]
        return self._choice({"message": message}, self.entries)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind in CHAT_FIELDS:
            return {"delta": dict.fromkeys(CHAT_FIELDS[piece.kind], piece.text)}
        more: dict[str, Any] = {"function": {"arguments": piece.text}}
        if piece.kind == "call":
            self.told += 1
            call = self.request.reader.calls[self.told]
            more = tool_call(call.id, call.name, "")
        return {"delta": {"tool_calls": [{"index": self.told, **more}]}}

    def _entries(self, tokens: Sequence[Token]) -> list[Any]:
        ends = self.request.stop_tokens
        return [logprob_entry(self.tokenizer, token) for token in tokens if token.id not in ends]

    def _logprobs(self, entries: Sequence[Any]) -> dict[str, Any]:
        return {"content": entries, "refusal": None}


class TextChoice(Choice):
    """A choice of POST /v1/completions: a text, with its log-probabilities by the offset of each
    token.
    """

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, asked: Asked, request: Request) -> None:
        super().__init__(tokenizer, asked, request)
        self.text = self.echo = ""
        self.offset = 0  # characters up to the next token
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        if asked.echo and asked.prompts:
            prompt = asked.prompts[request.index // asked.n]
            decoded = tokenizer.decode(request.prompt).decode(errors="replace")
            self.echo = prompt if isinstance(prompt, str) else decoded
            # SentencePiece puts a space before a prompt
            self.offset = len(self.echo) - len(decoded)

    def whole(self) -> dict[str, Any]:
        return self._choice({"text": self.text}, self.entries)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        text, self.echo = self.echo, ""
        if piece.kind != "end":
            text += piece.text
        self.text += text
        return {"text": text}

    def _entries(self, tokens: Sequence[Token]) -> list[Any]:
        entries = []
        for token in tokens:
            name, text = spelled(self.tokenizer, token.id)
            likely = {spelled(self.tokenizer, other)[0]: logprob for other, logprob in token.likely}
            own = {} if token.logprob is None else {name: token.logprob}
            entries.append((max(0, self.offset), name, token.logprob, likely | own or None))
            self.offset += len(self.decode(text))
        return entries

    def _logprobs(self, entries: Sequence[Any]) -> dict[str, Any]:
        columns = ("text_offset", "tokens", "token_logprobs", "top_logprobs")
        return dict(zip(columns, zip(*entries)))


class ChoicesWriter(Writer):
    """OpenAI's JSON or server-sent events with a list of choices, one for each request."""

    def __init__(
        self, choice: type[Choice], model: Model, asked: Asked, requests: Sequence[Request]
    ) -> None:
        # what every object repeats
        self.head = {
            "id": new_id(choice.prefix), "created": int(time.time()), "model": model.name
        }  # fmt: skip
        self.choice = choice
        self.choices = [choice(model.tokenizer, asked, request) for request in requests]
        self.requests, self.n = requests, asked.n
        self.usage, self.usage_so_far = asked.usage, asked.usage_so_far

    def begin(self) -> bytes:
        return b"".join(self._chunk(first) for choice in self.choices for first in choice.begin())

    def add(self, request: Request, piece: Piece) -> bytes:
        return self._chunk(self.choices[request.index].add(piece))

    def close(self) -> bytes:
        return (self._chunk() if self.usage else b"") + b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        choices = [choice.whole() for choice in self.choices]
        answer = {"object": self.choice.whole_object, "choices": choices, "usage": self._usage()}
        return {**self.head, **answer}

    def broken(self, error: ApiError) -> bytes:
        return server_sent(openai_error(error))

    def _chunk(self, *choices: dict[str, Any]) -> bytes:
        chunk = {**self.head, "object": self.choice.chunk_object, "choices": choices}
        if self.usage_so_far or not choices:
            chunk["usage"] = self._usage()
        return server_sent(chunk)

    def _usage(self) -> dict[str, Any]:
        """The tokens of all requests. The `n` answers to a prompt share it."""
        first = self.requests[:: self.n]
        prompt = sum(len(request.prompt) for request in first)
        count = sum(request.reader.count for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
            "prompt_tokens_details": {"cached_tokens": sum(request.cached for request in first)},
        }


class PartsWriter(Writer):
    """Writes an answer that is a list of parts: thinking, text and calls. Each is open until
    another begins, or the answer ends.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        (self.request,) = requests
        self.calls = iter(self.request.reader.calls)  # those that have no part yet
        self.parts: list[dict[str, Any]] = []
        self.kind = self.text = ""  # of the last part

    def add(self, request: Request, piece: Piece) -> bytes:
        data = b""
        if piece.kind == "call" or piece.kind not in ("arguments", self.kind):
            data = self.close_part(piece) if self.kind else b""
            self.kind, self.text = piece.kind, ""
            data += self.end() if piece.kind == "end" else self.open_part()
        if piece.kind in ("call", "end"):
            return data
        self.text += piece.text
        return data + self.extend_part(piece)

    def open_part(self) -> bytes:
        """Begin a part of this kind; returns what a stream says of it, as all of these do."""
        raise NotImplementedError

    def extend_part(self, piece: Piece) -> bytes:
        """Add a piece to the last part."""
        raise NotImplementedError

    def close_part(self, following: Piece) -> bytes:
        """Complete the last part, as another piece follows."""
        raise NotImplementedError

    def end(self) -> bytes:
        """All parts are complete."""
        raise NotImplementedError


# An item of thinking or text: its list of parts, and the events of its one part and of that part's
# text. Thinking is a summary, as all clients show that, and few show reasoning_text.
TEXT_ITEMS = {
    "thinking": ("summary", "reasoning_summary_part", "reasoning_summary_text"),
    "text": ("content", "content_part", "output_text"),
}


class ResponsesWriter(PartsWriter):
    """POST /v1/responses: a list of items, or the events that build it."""

    def __init__(self, model: Model, asked: Asked, requests: Sequence[Request]) -> None:
        super().__init__(requests)
        self.tokenizer = model.tokenizer
        self.head: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model.name,
        }
        self.said, self.history, self.kept = asked.said, asked.history, model.kept
        self.logprobs = asked.sampling.logprobs is not None
        self.place: dict[str, Any] = {}  # of the last item, as events give it
        self.content: dict[str, Any] = {}  # what has its text
        self.numbers = itertools.count()  # of events

    def begin(self) -> bytes:
        response = self._response("in_progress")
        return self._event("created", response=response) + self._event(
            "in_progress", response=response
        )

    def whole(self) -> dict[str, Any]:
        cut = self.request.reader.finish == "length"
        return self._response("incomplete" if cut else "completed")

    def broken(self, error: ApiError) -> bytes:
        # OpenAI's own clients raise the first as an exception. codex knows only the second.
        code, message = error.code or "server_error", str(error)
        top = {"code": code, "message": message, "param": error.param}
        failed = self._response("failed")
        failed["error"] = {"code": "server_error", "message": message}
        return self._event("error", **openai_error(error), **top) + self._event(
            "failed", response=failed
        )

    def _response(self, status: str) -> dict[str, Any]:
        cut, whole = status == "incomplete", status == "completed"
        return {
            **self.head,
            "status": status,
            "output": self.parts,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": int(time.time()) if whole else None,
            "usage": self._usage() if cut or whole else None,
            "background": False,
            "max_tool_calls": None,
            "service_tier": "default",
            **from_json(self.said),
        }

    def _usage(self) -> dict[str, Any]:
        reader, prompt = self.request.reader, len(self.request.prompt)
        thinking = min(reader.count, len(self.tokenizer.encode_text(reader.thinking)))
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.request.cached, "cache_write_tokens": 0},
            "output_tokens": reader.count,
            "output_tokens_details": {"reasoning_tokens": thinking},
            "total_tokens": prompt + reader.count,
        }

    def _keep(self) -> None:
        """Keep the conversation for the next request, and each item, unless the client wants none
        of it.
        """
        if self.history is not None:
            conversation = self.history
            for item in self.parts:
                if item["status"] == "completed" or "content" in item:
                    self.kept.keep(item["id"], line := long_json(item))
                    conversation += line
            self.kept.keep(self.head["id"], conversation)

    def open_part(self) -> bytes:
        if self.kind == "call":
            call = next(self.calls)
            return self._add_item("function_call", call_id=call.id, name=call.name, arguments="")
        if self.kind == "text":
            data = self._add_item("message", role="assistant", content=[])
            self.content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            data = self._add_item("reasoning", summary=[])
            self.content = {"type": "summary_text", "text": ""}
        contents, event, _ = TEXT_ITEMS[self.kind]
        self.parts[-1][contents] = [self.content]
        self.place[f"{contents}_index"] = 0
        return data + self._event(f"{event}.added", **self.place, part=self.content)

    def _add_item(self, kind: str, **more: Any) -> bytes:
        item = {"type": kind, "id": new_id(f"{kind}_"), "status": "in_progress", **more}
        self.place = {"output_index": len(self.parts), "item_id": item["id"]}
        self.parts.append(item)
        return self._event("output_item.added", output_index=len(self.parts) - 1, item=item)

    def extend_part(self, piece: Piece) -> bytes:
        if self.kind == "call":
            return self._event("function_call_arguments.delta", **self.place, delta=piece.text)
        tokens = piece.tokens if self.logprobs and self.kind == "text" else ()
        entries = [logprob_entry(self.tokenizer, token) for token in tokens]
        self.content.get("logprobs", []).extend(entries)
        event = TEXT_ITEMS[self.kind][2]
        return self._event(f"{event}.delta", **self.place, delta=piece.text, logprobs=entries)

    def close_part(self, following: Piece) -> bytes:
        item, cut = self.parts[-1], following.kind == "end" and following.text == "length"
        item["status"] = "incomplete" if cut else "completed"
        if self.kind == "call":
            said = {"name": item["name"], "arguments": self.text}
            item |= said
            data = self._event("function_call_arguments.done", **self.place, **said)
        else:
            _, part_event, text_event = TEXT_ITEMS[self.kind]
            self.content["text"] = self.text
            said = {"text": self.text, "logprobs": self.content.get("logprobs", [])}
            data = self._event(f"{text_event}.done", **self.place, **said)
            data += self._event(f"{part_event}.done", **self.place, part=self.content)
        return data + self._event("output_item.done", output_index=len(self.parts) - 1, item=item)

    def end(self) -> bytes:
        self._keep()
        response = self.whole()
        return self._event(response["status"], response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        kind = kind if kind == "error" else f"response.{kind}"
        event = {"type": kind, "sequence_number": next(self.numbers), **fields}
        return server_sent(event, kind, long_json if "response" in fields else to_json)


class AnthropicWriter(PartsWriter):
    """POST /v1/messages: a list of blocks, or the events that build it."""

    def __init__(self, model: Model, asked: Asked, requests: Sequence[Request]) -> None:
        super().__init__(requests)
        self.head = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": asked.said,
        }

    def begin(self) -> bytes:
        return self._event("message_start", message=self.whole())

    def end(self) -> bytes:
        whole = self.whole()
        stop = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
        return self._event("message_delta", delta=stop, usage=whole["usage"])

    def close(self) -> bytes:
        return self._event("message_stop")

    def whole(self) -> dict[str, Any]:
        request, reader = self.request, self.request.reader
        reason = "stop_sequence" if reader.stopped else "tool_use" if reader.calls else "end_turn"
        reasons = {"": None, "length": "max_tokens", "stop": reason}
        usage = {
            "input_tokens": len(request.prompt) - request.cached,
            "cache_read_input_tokens": request.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": reader.count,
        }
        stop = {"stop_reason": reasons[reader.finish], "stop_sequence": reader.stopped or None}
        return {**self.head, "content": self.parts, **stop, "usage": usage}

    def ping(self) -> bytes:
        return self._event("ping")

    def broken(self, error: ApiError) -> bytes:
        return server_sent(anthropic_error(error), "error")

    def open_part(self) -> bytes:
        block: dict[str, Any] = {"type": self.kind, self.kind: ""}
        if self.kind == "thinking":
            block["signature"] = ""
        if self.kind == "call":
            call = next(self.calls)
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        self.parts.append(block)
        return self._event_of_block("start", content_block=block)

    def extend_part(self, piece: Piece) -> bytes:
        delta = {"type": f"{self.kind}_delta", self.kind: piece.text}
        if self.kind == "call":
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        return self._event_of_block("delta", delta=delta)

    def close_part(self, following: Piece) -> bytes:
        block, data = self.parts[-1], b""
        if self.kind == "call":
            block["input"] = json_object(self.text) or {}
        else:
            block[self.kind] = self.text
        if self.kind == "thinking":  # clients send it back, and keep no thinking without one
            block["signature"] = hashlib.sha256(self.text.encode()).hexdigest()
            delta = {"type": "signature_delta", "signature": block["signature"]}
            data = self._event_of_block("delta", delta=delta)
        return data + self._event_of_block("stop")

    def _event_of_block(self, what: str, **fields: Any) -> bytes:
        """An event of the last block."""
        return self._event(f"content_block_{what}", index=len(self.parts) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return server_sent({"type": kind, **fields}, kind)


# ==================================================================================================
# Page
# ==================================================================================================

# The chat page. It inserts what people and models write as text nodes only, never as markup.
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
#settings { margin: 5.5rem max(1rem, 50% - 22rem) 0 auto; padding: 1rem; border-radius: 1rem; }
label > * { display: block; width: 18rem; margin: .25rem 0 .75rem; color: CanvasText; font-size: 1rem; }
main { flex: 1; padding: 1rem 0; }
article { display: grid; gap: .75rem; margin-bottom: 2.5rem; white-space: pre-wrap; }
.user { justify-self: end; padding: .6rem 1rem; border-radius: 1.2rem; background: var(--tint); }
b, .title { font-weight: 600; }
.title { font-size: 1.15rem; }
code { font-family: ui-monospace, monospace; font-size: .9rem; }
pre, :not(pre) > code { padding: .1rem .3rem; border-radius: .4rem; background: var(--tint); }
pre { padding: .75rem 1rem; white-space: pre-wrap; }
article > small { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; }
article > small > span { flex: 1; }
pre button, article > small > button { padding: 0 .5rem; font-size: .8rem; color: CanvasText; }
pre button { float: right; }
details, #ideas { color: var(--soft); }
#ideas { display: grid; justify-items: start; gap: .5rem; padding-bottom: 2rem; }
main:not(:empty) + #ideas, details:not(:has(p:not(:empty))), .failed button, article:not(:last-child) .again,
[aria-busy=true] :last-child > small > button { display: none; }
[aria-busy=true] :last-child > .assistant::after { content: "▍"; color: var(--accent); }
.failed small, .gone, .stopping, .unhealthy { color: var(--alert); }
#state { width: 100%; }
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
<section id="ideas">
  To begin with:
  <button>What is machine learning?</button> <button>Write a haiku</button> <button>Tell me a joke</button>
</section>
<template><article>
  <h2 class="user"></h2><details><summary>Thinking</summary><p></p></details><div class="assistant"></div>
  <small><span></span><button>Copy</button><button class="again">Ask again</button></small>
</article></template>
<footer>
  <textarea id="input" rows="2" placeholder="What would you like to know?" aria-label="Message" autofocus></textarea>
  <button id="send" disabled>Send</button>
  <small id="state"></small>
</footer>
<script>
const $ = (selector) => document.querySelector(selector)
const input = $("#input")
let health = {}  // the last answer of GET /health
let request = null  // the AbortController of the answer under way
let atEnd = true  // the reader is at the end of the conversation: keep the end in view

function render() {
  const {status, model, device, error, progress = {}} = health
  const summary = [status, device].filter(Boolean).join(" · ")
  const percent = progress.done ? ` ${Math.round(100 * progress.done)} %,` : ""
  if ($("#status").textContent !== summary) $("#status").textContent = summary  // screen readers read out each change
  $("#model").textContent = document.title = model || "Chat"
  $("#state").className = status
  $("#state").textContent = {
    healthy: "Enter sends · Shift+Enter new line · Esc stops",
    loading: `Getting ready: ${progress.doing},${percent} ${Math.round(progress.seconds)} s`,
    stopping: "The server is stopping: it completes the answers under way and takes no new questions",
    gone: "The server cannot be reached: this page tries again every second",
  }[status] || `The server cannot answer: ${error}`
  $("#send").textContent = request ? "Stop" : "Send"
  $("#send").disabled = !request && status !== "healthy"
  $("main").ariaBusy = Boolean(request)
}

// Markdown: blocks of code, and other text up to a blank line.
const CONTENT_BLOCK = /^```[^]*?(?:\n```[ \t]*(?:\n|$(?![^]))|$(?![^]))|[^]+?(?:\n\n+|(?=^```)|$(?![^]))/gm

function make(tag, className, ...content) {
  const element = Object.assign(document.createElement(tag), {className})
  element.append(...content)
  return element
}

function styled(line) {
  const marked = (part) => part[0] === "*" ? make("b", "", part.slice(2, -2)) : make("code", "", part.slice(1, -1))
  return line.split(/(\*\*[^*\n]+\*\*|`[^`\n]+`)/).map((part, i) => i % 2 ? marked(part) : part)
}

// The clipboard is for pages from localhost or with TLS; elsewhere the element is selected, to be copied by hand.
function copies(button, element, text = () => element.textContent) {
  button.onclick = async () => {
    if (!navigator.clipboard) return getSelection().selectAllChildren(element)
    await navigator.clipboard.writeText(text())
    button.textContent = "Copied"
    setTimeout(() => { button.textContent = "Copy" }, 1500)
  }
  return button
}

function block(source) {
  if (source.startsWith("```")) {
    const code = make("code", "", source.replace(/^.*\n?/, "").replace(/\n?```[ \t]*\n?$/, ""))
    return make("pre", "", copies(make("button", "", "Copy"), code), code)
  }
  return make("span", "", ...source.split(/(?<=\n)/).flatMap((line) => {
    const [, title] = line.match(/^#{1,6} +([^]*)/) || []
    return title ? make("span", "title", ...styled(title)) : styled(line.replace(/^( *)[-*] +/, "$1• "))
  }))
}

function show(element, text) {  // makes only the blocks that have changed
  for (const [i, source] of (text.match(CONTENT_BLOCK) || []).entries()) {
    const old = element.children[i]
    if (old?.source === source) continue
    const made = Object.assign(block(source), {source})
    old ? old.replaceWith(made) : element.append(made)
  }
}

async function poll() {
  const gone = () => ({...health, status: "gone"})
  health = await fetch("/health", {signal: AbortSignal.timeout(5000)}).then((reply) => reply.json()).catch(gone)
  render()
  setTimeout(poll, health.status === "healthy" ? 5000 : 1000)
}

// A turn is what is kept, and what an article shows: {question, thinking, answer, note, failed}.
const articles = () => [...document.querySelectorAll("article")]

function add(turn) {
  const article = $("template").content.firstElementChild.cloneNode(true)
  const [user, , assistant, foot] = article.children
  user.textContent = turn.question
  copies(foot.children[1], assistant, () => turn.answer)
  foot.lastElementChild.onclick = () => ask(turn.question, article)
  $("main").append(Object.assign(article, {turn}))
  draw(article)
  return article
}

function draw(article) {
  const {thinking, answer, note, failed} = article.turn
  const [, thoughts, assistant, foot] = article.children
  article.className = failed ? "failed" : ""
  thoughts.lastElementChild.textContent = thinking.trim()
  show(assistant, answer)
  foot.firstElementChild.textContent = note
}

function save() {  // for this tab
  try {
    sessionStorage.chat = JSON.stringify(articles().map((article) => article.turn))
  } catch { /* the browser keeps nothing, or not so much */ }
}

async function ask(question, old) {
  if (health.status !== "healthy" || request || !question.trim()) return
  old ? old.remove() : input.value = ""
  input.focus()
  const turn = {question, thinking: "", answer: "", note: ""}
  const article = add(turn)
  atEnd = true
  request = new AbortController()
  render()
  const last = await receive(article).catch(() => ({}))  // the reader stopped it, or the connection broke
  if (last.done) {
    if (last.finish_reason === "length") turn.note = `Cut off at the limit of ${last.tokens_generated} tokens · `
    turn.note += `${last.tokens_per_second} tokens/s · first token after ${last.time_to_first_token_seconds} s`
  } else if (request.signal.aborted) {
    turn.note = "Stopped"
  } else {
    turn.failed = true
    turn.note = "Failed: " + (last.error || "the connection to the server broke")
    input.value = [question, input.value].filter(Boolean).join("\n")  // to send it again
  }
  request = null
  draw(article)
  save()
  render()
}

async function receive(article) {  // shows the answer as it arrives; returns the last line: the figures, or an error
  const turn = article.turn
  const messages = articles().map((other) => other.turn).filter((other) => !other.failed).flatMap((other) =>
    [{role: "user", content: other.question}, {role: "assistant", content: other.answer}])
  const response = await fetch("/chat", {
    method: "POST", headers: {"Content-Type": "application/json"}, signal: request.signal,
    body: JSON.stringify({  // an empty number is NaN, in JSON null: the server's default
      messages: messages.slice(0, -1), stream: true, system: $("#system").value || null,
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
      if (last.done) continue
      turn.thinking += last.thinking || ""
      turn.answer += last.response || ""
      draw(article)
    }
  }
  return last
}

document.onkeydown = (event) => {
  if (event.isComposing || event.keyCode === 229) return  // belongs to an input method; Safari sets only keyCode
  if (event.key === "Escape") request?.abort()
  if (event.key !== "Enter" || event.shiftKey || event.target !== input) return
  event.preventDefault()
  ask(input.value)
}
$("#send").onclick = () => request ? request.abort() : ask(input.value)
for (const idea of $("#ideas").children) idea.onclick = () => ask(input.value = idea.textContent)
$("footer").onclick = () => input.focus()
$("#new").onclick = () => {
  request?.abort()
  $("main").replaceChildren()
  save()
  input.focus()
}
onbeforeunload = onpagehide = () => {
  request?.abort()
  save()
}
try {  // what a reload has interrupted has no note
  for (const turn of JSON.parse(sessionStorage.chat)) add({...turn, note: turn.note || "Stopped"})
} catch { /* nothing is kept */ }
document.onscroll = () => { atEnd = scrollY + innerHeight > document.body.scrollHeight - 2 }
new ResizeObserver(() => { if (atEnd) scrollTo(0, document.body.scrollHeight) }).observe(document.body)
poll()
</script>
"""


# ==================================================================================================
# HTTP
# ==================================================================================================

MAX_HEADER = 64 << 10  # bytes, beside the first line
# A line of a header, and the empty one that ends it. http.client's parser takes more: lines without
# a colon, lines that go on in the next, a \r for a line's end, and a header that breaks off.
HEADER_LINE = re.compile(rb"([!-9;-~]+:[^\r\n]*)?\r?\n")


class HeaderLines:
    """The lines of a header as http.client reads them, of which all together have a limit."""

    malformed = False

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._left = MAX_HEADER

    def readline(self, _: int) -> bytes:
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("header")
        self.malformed = self.malformed or not HEADER_LINE.fullmatch(line)
        return line


class ApiHandler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own. http.server parses the requests; this class routes
    and answers them.
    """

    server: ApiServer
    writer: Writer  # of the answer that is under way
    protocol_version = default_request_version = request_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # else an answer on a kept connection can wait 40 ms for an acknowledgement
    )
    wbufsize = -1  # buffered: an answer, or a piece of a stream, leaves in one write

    def setup(self) -> None:
        super().setup()
        # of each read and write; a deadline comes first
        self.connection.settimeout(self.server.patience + 1)
        # by when a whole header or body must be here; the sweep enforces it
        self.deadline = math.inf
        self.late = False  # the client's time is over: only what has arrived is read
        self.busy = False  # a request is here, or at least its header
        self.waiting: list[Request] = []  # the requests that are being answered
        self.server.make_room()
        self.server.handlers.add(self)

    def expire(self) -> None:
        """Stop reading from this client. A request that has arrived is still answered."""
        self.late = True
        self.deadline = math.inf
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)  # a read returns what has come

    def hung_up(self) -> bool:
        """Whether the client has closed the connection, or its sending side. Never waits."""
        poll = select.poll()
        # POLLRDHUP is Linux's, and comes behind unread input. Once late, all input ends here.
        wanted = 0 if self.late else select.POLLIN | getattr(select, "POLLRDHUP", 0)
        try:
            poll.register(self.connection, wanted)
            events = sum(event for _, event in poll.poll(0))
            return events > 0 and not (
                events == select.POLLIN and self.connection.recv(1, socket.MSG_PEEK)
            )
        except (OSError, ValueError):  # this side has closed it
            return True

    def handle_one_request(self) -> None:
        """Wait for a request, answer it and log it."""
        self.command = self.path = self.outcome = ""
        self.route = "other"  # or a path in ROUTES
        self.headers = self.MessageClass()
        self.status = 0
        # a connection that waits keeps nothing of its last request
        self.body, self.writer = b"", Writer()
        self.unread = self.busy = False
        self.deadline = time.monotonic() + self.server.patience
        try:
            self.answer()
        except OSError:
            self.hang_up()
        if self.status:
            self.server.responses[self.route, self.status] += 1
            watches = self.command in ("GET", "HEAD") and self.status in (200, 503)
            line = f"{printable(self.command)} {printable(self.path)} {self.status}{self.outcome}"
            logger.log(logging.DEBUG if watches else logging.INFO, line)

    def answer(self) -> None:
        """Answer one request, or send an error. Raises OSError if the client has left."""
        try:
            if self.read_header():
                if self.path != "/health" and self.server.crowded:
                    raise ApiError(503, "too many connections are open: try again in a moment")
                self.check_site()
                self.check_key()
                self.body = self.read_body()
                self.respond()
        except ApiError as error:
            self.send_api_error(error)
        except OSError:
            raise
        except Exception:
            logger.exception("an error in the server on %s", printable(self.path))
            self.send_api_error(
                ApiError(500, "the server failed on this request: its log says why")
            )

    def read_header(self) -> bool:
        """Read the header and find the endpoint; False if the client sends no more.

        Raises ApiError.
        """
        self.raw_requestline = self.rfile.readline(65537)
        if len(self.raw_requestline) > 65536:
            self.send_error(414)
        if len(self.raw_requestline.split()) == 2:
            # HTTP/0.9, of which Pythons from 3.14 on read no header
            self.send_error(400, "the first line has no version")
        file = self.rfile
        lines = HeaderLines(file)
        self.rfile = lines  # type: ignore[assignment]
        try:
            if not self.parse_request():  # nothing has come
                return False
        finally:
            self.rfile = file
        self.busy = True
        self.deadline = math.inf
        try:
            self.path = urllib.parse.urlsplit(self.path).path.rstrip("/") or "/"
        except ValueError:
            lines.malformed = True
        if self.path in ROUTES:
            self.route = self.path
        elif self.path.startswith("/v1/models/"):
            self.route = "/v1/models/NAME"
        # Refuse a header that a proxy in front could understand differently (request smuggling).
        lengths = self.headers.get_all("Content-Length", [])
        codings = self.headers.get_all("Transfer-Encoding", [])
        framing = " ".join([*lengths, *codings]).lower()
        known = "[0-9]{1,18}" if lengths else "chunked"
        self.unread = framing not in ("", "0")
        if (
            lines.malformed
            or len(self.headers.get_all("Host", [])) > 1
            or (codings and self.request_version == "HTTP/1.0")
            or ((lengths or codings) and not re.fullmatch(known, framing))
        ):
            self.unread = True
            rules = "one NAME: VALUE in each line, one Host, and one Content-Length or Transfer-Encoding: chunked"
            raise ApiError(400, f"the header is malformed: send a path, {rules}")
        return True

    def check_site(self) -> None:
        """Refuse pages of other sites by their Origin and, if only this machine may ask, by Host
        (DNS rebinding).
        """
        host = self.headers.get("Host")
        origin = self.headers.get("Origin")
        server = self.server
        if (
            host
            and server.on_loopback
            and not server.api_key
            and kind_of_host(f"//{host}") != "loopback"
        ):
            raise ApiError(
                403,
                f"the Host {printable(host)} is not this machine: use localhost, or set an API key",
            )
        if origin and not self.allowed(origin):
            name = printable(origin)
            raise ApiError(
                403, f"pages of {name} may not use this server: --allow-origin {name} lets them"
            )

    def allowed(self, origin: str) -> bool:
        """Whether pages of this origin may use the server: this machine's, its own, and those of
        --allow-origin.
        """
        kind = kind_of_host(origin)
        named = self.server.allowed_origins
        # Another site can make its name lead here, so the server's own page needs an IP address in
        # the URL, or the key.
        own = origin.partition("://")[2] == self.headers.get("Host") and (
            self.server.api_key or kind == "address"
        )
        return bool(own) or kind == "loopback" or origin in named or "*" in named

    def check_key(self) -> None:
        """Require the API key: as a Bearer token, as Anthropic's clients send it, or as a Basic
        password, for which a browser asks its user.
        """
        key = self.server.api_key
        if key is None or self.path == "/health" or self.command == "OPTIONS":
            return
        own = f"Bearer {self.headers.get('x-api-key', '')}"
        kind, _, credentials = self.headers.get("Authorization", own).partition(" ")
        given = credentials.strip().encode("latin-1")
        if kind.lower() == "basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given, validate=True).partition(b":")[2]
        elif kind.lower() != "bearer":
            given = b""
        if not hmac.compare_digest(given, key.encode()):
            message = "the API key is missing or wrong: send it with -H 'Authorization: Bearer KEY'"
            challenge = {"WWW-Authenticate": 'Basic realm="tt_api_server", charset="UTF-8"'}
            raise ApiError(401, message, code="invalid_api_key", **challenge)

    def read_body(self) -> bytes:
        """Read the whole body, even of a request that is refused afterwards, so that the connection
        can go on.
        """
        self.wfile.flush()  # http.server's 100 Continue
        self.deadline = time.monotonic() + self.server.patience
        length = int(self.headers.get("Content-Length", 0))
        body = bytearray()
        for size in self.chunk_sizes() if "Transfer-Encoding" in self.headers else [length]:
            if len(body) + size > MAX_BODY:
                raise ApiError(413, f"the body has more than {MAX_BODY} bytes: send less")
            body += self.rfile.read(size)
        if len(body) < length:
            raise ApiError(
                400, f"the body ends after {len(body)} of {length} bytes: send all of it"
            )
        self.deadline = math.inf
        self.unread = False
        return bytes(body)

    def chunk_sizes(self) -> Iterator[int]:
        """Yield the size of each chunk, which the caller then reads (RFC 9112, 7.1).

        Ignores trailer fields.
        """
        malformed = ApiError(400, "the chunked body is malformed: send it with a Content-Length")
        size = -1
        while size:
            head = re.fullmatch(
                rb"([0-9a-fA-F]{1,8})[ \t]*(;[^\r\n]*)?\r\n", self.rfile.readline(1024)
            )
            if not head:
                raise malformed
            yield (size := int(head[1], 16))
            while (line := self.rfile.readline(1024)) != b"\r\n":
                # only the last chunk has lines after it, the trailer
                if size or not line.endswith(b"\n"):
                    raise malformed

    def respond(self) -> None:
        """Call the endpoint. Raises ApiError if there is none, or for a wrong method."""
        if self.route == "other":
            # of a long path difflib would take the memory and the time of a hundred requests
            near = difflib.get_close_matches(self.path[:99], ROUTES, 1, 0.7)
            known = ", ".join(f"{route.method} {path}" for path, route in ROUTES.items())
            hint = f"did you mean {near[0]}?" if near else f"the endpoints are {known}"
            raise ApiError(404, f"there is no {printable(self.path)} here: {hint}")
        route = ROUTES[self.route]
        allowed = "OPTIONS, GET, HEAD" if route.method == "GET" else "OPTIONS, POST"
        if self.command == "OPTIONS":
            # The wildcard does not cover Authorization.
            permitted = {"Access-Control-Allow-Headers": "Content-Type, Authorization, *"}
            self.send_head(204, {"Allow": allowed, **permitted})
            self.wfile.flush()
        elif self.command not in allowed.split(", "):
            raise ApiError(
                405, f"{self.path} takes {route.method}, not {self.command}", Allow=allowed
            )
        else:
            route.endpoint(self)

    # The endpoints

    def page(self) -> None:
        self.send(200, PAGE.encode(), "text/html; charset=utf-8")

    def health(self) -> None:
        server = self.server
        scheduler = server.scheduler
        state = scheduler.state
        folder = (
            server.folder if server.on_loopback and not server.api_key else Path(server.folder).name
        )
        report: dict[str, Any] = {
            "status": state,
            "model_loaded": state == "healthy",
            "model": server.model,
            "device": scheduler.device,
            "llama_dir": folder,
            "note": server.note,
            "uptime_seconds": round(time.monotonic() - server.started, 1),
            "slots": {"total": len(scheduler.slots), "busy": scheduler.busy},
            "queued": len(scheduler.queue),
        }
        if state == "loading":
            doing, done = scheduler.doing
            report["progress"] = {
                "doing": doing,
                "done": done and round(done, 2),
                "seconds": report["uptime_seconds"],
            }
        if state == "unhealthy":
            report["error"] = scheduler.error
        self.send(200 if state == "healthy" else 503, to_json(report))

    def metrics(self) -> None:
        """Metrics in Prometheus's format, under vLLM's names with tt_ for vllm:."""
        model = f"model_name={json.dumps(printable(self.server.model), ensure_ascii=False)}"
        statistics = self.server.scheduler.statistics
        lines: list[str] = []
        for name, (what, figure) in self.server.figures().items():
            kind = "counter" if name.endswith("_total") else "gauge"
            samples = figure if isinstance(figure, Mapping) else {"": figure}
            lines += [f"# HELP tt_{name} {what}", f"# TYPE tt_{name} {kind}"]
            lines += [f"tt_{name}{{{model}{labels}}} {value}" for labels, value in samples.items()]
        for name, what in HISTOGRAMS.items():
            bounds = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
            counts = list(itertools.accumulate(statistics.counts[name]))
            lines += [f"# HELP tt_{name} {what}", f"# TYPE tt_{name} histogram"]
            for bound, count in zip(bounds, counts):
                lines.append(f'tt_{name}_bucket{{{model},le="{bound}"}} {count}')
            lines.append(f"tt_{name}_sum{{{model}}} {statistics.sums[name]}")
            lines.append(f"tt_{name}_count{{{model}}} {counts[-1]}")
        text = "\n".join([*lines, ""])
        self.send(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def models(self) -> None:
        server = self.server
        name = urllib.parse.unquote(self.path.partition("/v1/models/")[2])
        server.scheduler.check_available()
        if name:
            check_model(name, server.model)
        model = {
            "id": server.model,
            "object": "model",
            "created": server.created,
            "owned_by": "tt_api_server",
            "max_model_len": server.served.max_seq_len,  # vLLM's
            # Anthropic's
            "type": "model",
            "display_name": server.model,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(server.created)),
        }
        page = {"has_more": False, "first_id": server.model, "last_id": server.model}
        self.send(200, to_json(model if name else {"object": "list", "data": [model], **page}))

    def complete(self) -> None:
        """Generate text, in any dialect, streamed or not."""
        scheduler = self.server.scheduler
        scheduler.check_available()
        requests, writer, stream = self.read_requests()
        scheduler.submit(*requests)
        self.waiting = requests  # from now on the sweep checks that the client is still there
        self.writer = writer
        try:
            if stream:
                self.send_piece(writer.begin())
            eager = stream or requests[0].reader.may_end
            for pieces in pieces_of(requests, eager):
                for request, piece in pieces:
                    data = writer.add(request, piece)
                    if piece.kind == "end":  # it may run on after a stop string
                        scheduler.cancel(request, request.reader.finish)
                    if stream and data:
                        self.send_piece(data)
                if stream and time.monotonic() - self.spoke > self.server.silence:
                    self.send_piece(writer.ping())
            if stream:
                self.send_piece(writer.close(), last=True)
            else:
                self.send(200, long_json(writer.whole()))
        finally:
            self.waiting = []
            for request in requests:
                scheduler.cancel(request)
            prompt = sum(len(request.prompt) for request in requests)
            count = sum(request.reader.count for request in requests)
            speed = round(count / max(1e-9, *(request.seconds for request in requests)), 1)
            self.outcome = f" prompt={prompt} generated={count}"
            self.outcome += f" first={requests[0].wait}s {speed} tokens/s"

    def read_requests(self) -> tuple[list[Request], Writer, bool]:
        """The requests of the body, the writer of their answers, and whether it is to stream.

        Raises ApiError.

        Nothing of the body itself is kept while the requests wait.
        """
        route = ROUTES[self.route]
        model = self.server.served
        size = len(self.body)
        assert route.read and route.writer
        with self.turn():
            asked = route.read(self.read_json(), model)
            encoded = prompt_tokens(asked, model.tokenizer)
        try:  # may wait for a grammar, while others parse
            requests = make_requests(asked, encoded, model)
        except OSError as error:  # of this machine: `answer` would take it for the connection's
            raise RuntimeError("a process for grammars cannot be started") from error
        requests[0].size = size
        return requests, route.writer(model, asked, requests), asked.stream

    def server_info(self) -> None:
        """What sglang-router asks a server for."""
        self.send(200, to_json({"served_model_name": self.server.model}))

    def tokenize(self) -> None:
        self.server.scheduler.check_available()
        read = ROUTES[self.route].read
        assert read
        with self.turn():
            answer = read(self.read_json(), self.server.served)
        self.send(200, long_json(answer))

    def turn(self) -> threading.Semaphore:
        """What to hold while the body is read: JSON and text."""
        server = self.server
        return server.parsing if len(self.body) <= LARGE else server.parsing_large

    def read_json(self) -> Any:
        """The body's JSON, which is not kept. Raises ApiError."""
        body = self.body
        self.body = b""
        if self.hung_up():  # while others had their turn
            raise ConnectionError("the client has left")
        coding = self.headers.get("Content-Encoding", "identity").lower()
        if self.headers.get_content_type() != "application/json" or coding != "identity":
            raise ApiError(
                415,
                "the body must be uncompressed JSON: send it with -H 'Content-Type: application/json'",
            )
        logger.debug("%s", printable(body.decode(errors="replace")))
        try:
            return from_json(body)
        except ValueError as error:
            example = ROUTES[self.route].example
            message = f"the body cannot be read as JSON ({error}): send {example}"
            raise ApiError(400, message) from error

    # Answers

    def send(
        self, status: int, body: bytes, content_type: str = "application/json", **headers: str
    ) -> None:
        """Send a whole answer."""
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}
        if status == 503:
            headers["Retry-After"] = "1"
        self.send_head(status, headers)
        self.wfile.write(b"" if self.command == "HEAD" else body)
        self.wfile.flush()

    def send_piece(self, data: bytes, last: bool = False) -> None:
        """Send a piece of a stream; the header leaves with the first."""
        chunked = self.request_version != "HTTP/1.0"
        if not self.status:
            headers = {"Content-Type": self.writer.content_type, "Cache-Control": "no-cache"}
            framing = {"Transfer-Encoding": "chunked"} if chunked else {"Connection": "close"}
            self.send_head(200, headers | framing)
        if chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if chunked and last:
            data += b"0\r\n\r\n"
        self.wfile.write(data)
        self.wfile.flush()
        self.spoke = time.monotonic()  # when the stream last said something

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        """Write the status line and the header."""
        self.status = status
        self.send_response_only(status)
        # The rest of an unread body would be taken for the next request. http.server acts on this
        # header.
        ends = self.unread or self.late or self.close_connection
        connection = "close" if ends else "keep-alive"
        headers = {"Date": self.date_time_string(), "Connection": connection, **headers}
        origin = self.headers.get("Origin")
        if origin and self.allowed(origin):
            headers |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if identity := self.headers.get("X-Request-Id"):
            headers["X-Request-Id"] = printable(identity)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_api_error(self, error: ApiError) -> None:
        """Send an error in the dialect's form; in a stream that has begun, as its last item."""
        if self.status:
            self.send_piece(self.writer.broken(error), last=True)
        else:
            if self.late:
                error = ApiError(408, "the request did not come in time: send it again")
            forms = (form for path, form in ERROR_FORMS.items() if self.path.startswith(path))
            form = next(forms, plain_error)
            self.send(error.status, to_json(form(error)), **error.headers)
        logger.debug("%s %s: %s", printable(self.command), printable(self.path), error)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> NoReturn:
        """http.server calls this for a first line or a header that it cannot parse."""
        self.unread = True
        too_long = f"the first line or the header has more than {MAX_HEADER} bytes, or more than 100 fields: send less"
        raise ApiError(
            code,
            too_long if code in (414, 431) else f"send HTTP/1.1 without TLS: {printable(message)}",
        )

    def hang_up(self) -> None:
        """The client has left or does not read: end the connection without waiting until it takes
        the rest.
        """
        self.close_connection = True
        if self.command:  # not between two requests
            self.status = 499  # nginx's, for the log
            self.outcome += " the client has left"
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Close the connection.

        Unread input would reset it, and the client could lose the answer: drain it first.
        """
        self.deadline = time.monotonic() + 2
        self.late = False
        with contextlib.suppress(OSError):
            super().finish()
            self.connection.shutdown(socket.SHUT_WR)
            while self.unread and not self.late and self.connection.recv(65536):
                pass
        self.server.handlers.discard(self)


class Route(NamedTuple):
    """What answers a path."""

    method: str
    endpoint: Callable[[ApiHandler], None]
    example: str = ""  # a body
    read: Callable[[Any, Model], Any] | None = None  # the body; what is asked for, or the answer
    writer: Callable[[Model, Asked, Sequence[Request]], Writer] | None = None  # of the answer


chat_writer = functools.partial(ChoicesWriter, ChatChoice)
text_writer = functools.partial(ChoicesWriter, TextChoice)
CHAT_EXAMPLE = '{"messages": [{"role": "user", "content": "Hello!"}]}'
ANTHROPIC_EXAMPLE = CHAT_EXAMPLE[:-1] + ', "max_tokens": 100}'
PROMPT_EXAMPLE = '{"prompt": "Hello!"}'
# The first that begins a path gives its errors their form.
ERROR_FORMS = {
    "/v1/messages": anthropic_error,
    "/v1": openai_error,
    "/tokenize": openai_error,
    "/detokenize": openai_error,
}
ROUTES: dict[str, Route] = {
    "/": Route("GET", ApiHandler.page),
    "/health": Route("GET", ApiHandler.health),
    "/metrics": Route("GET", ApiHandler.metrics),
    "/chat": Route("POST", ApiHandler.complete, PROMPT_EXAMPLE, read_chat, ChatWriter),
    "/v1/chat/completions": Route(
        "POST", ApiHandler.complete, CHAT_EXAMPLE, read_chat_completions, chat_writer
    ),
    "/v1/responses": Route(
        "POST", ApiHandler.complete, '{"input": "Hello!"}', read_responses, ResponsesWriter
    ),
    "/v1/completions": Route(
        "POST", ApiHandler.complete, PROMPT_EXAMPLE, read_completions, text_writer
    ),
    "/v1/messages": Route(
        "POST", ApiHandler.complete, ANTHROPIC_EXAMPLE, read_anthropic, AnthropicWriter
    ),
    "/v1/messages/count_tokens": Route("POST", ApiHandler.tokenize, CHAT_EXAMPLE, count_tokens),
    "/v1/models": Route("GET", ApiHandler.models),
    "/server_info": Route("GET", ApiHandler.server_info),
    "/tokenize": Route("POST", ApiHandler.tokenize, PROMPT_EXAMPLE, tokenize),
    "/detokenize": Route("POST", ApiHandler.tokenize, '{"tokens": [9906]}', detokenize),
    "/v1/models/NAME": Route("GET", ApiHandler.models),
}


def kind_of_host(url: str) -> str:
    """What the host of a URL, or of //host:port, is:

    "loopback" (this machine only), another "address", or a "name".
    """
    with contextlib.suppress(ValueError):
        host = urllib.parse.urlsplit(url).hostname or ""
        if (
            host == "localhost"
            or host.endswith(".localhost")
            or ipaddress.ip_address(host).is_loopback
        ):
            return "loopback"
        return "address"
    return "name"


NO_THREAD = b"""HTTP/1.1 503 Service Unavailable\r
Content-Type: application/json\r
Retry-After: 1\r
Connection: close\r
\r
{"error": "the server can take no more connections: try again in a moment"}
"""


class ApiServer(ThreadingHTTPServer):
    """The listening socket, and the state that its handlers share."""

    request_queue_size = 1024
    # from Python 3.14 on http.server sets it, and two servers could share a port unnoticed
    allow_reuse_port = False
    # http.server's looks up this machine's name, for seconds
    server_bind = socketserver.TCPServer.server_bind

    max_connections = 512
    # seconds that a client may take for a header, for a body, for each write, and between requests
    patience = 60.0
    silence = 10.0  # seconds after which a stream says that it waits
    api_key: str | None = None
    allowed_origins: Sequence[str] = ()
    scheduler: Scheduler
    model = folder = note = ""
    served: Model  # once it is loaded
    cut_short = False  # a stop has cancelled requests
    _next_sweep = _next_line = _next_trim = 0.0

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), ApiHandler)
        self.server_port = self.server_address[1]
        any_address = host in ("0.0.0.0", "::")
        name = "localhost" if any_address else f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_port}"
        self.on_loopback = not any_address and kind_of_host(self.url) == "loopback"
        self.created = int(time.time())
        self.started = time.monotonic()
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status
        # More threads that read JSON and text at once would delay /health.
        # Large bodies do not delay small ones.
        self.parsing = threading.Semaphore(2)
        self.parsing_large = threading.Semaphore(1)
        self.handlers: set[ApiHandler] = set()  # one for each open connection
        # Answered without a thread, since the last sweep and before it. They stay open for a while:
        # closing a connection whose client still sends would reset it before the answer is read.
        self.leaving: list[socket.socket] = []
        self.left: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread. If the system gives none, answer here, without waiting."""
        try:
            super().process_request(request, client_address)
        except (RuntimeError, MemoryError):  # can't start new thread
            self.responses["other", 503] += 1
            cure = "raise its limit (ulimit -u, or a container's pids)"
            self.log_rarely(f"connections get 503, as the system gives no more threads: {cure}")
            with contextlib.suppress(OSError):
                request.send(NO_THREAD)  # a new connection takes it at once
                request.shutdown(socket.SHUT_WR)
            self.leaving.append(request)

    def make_room(self) -> None:
        """At the limit of connections, end the one that has been idle for longest."""
        idle = [h for h in list(self.handlers) if not h.busy and h.deadline < math.inf]
        if idle and len(self.handlers) >= self.max_connections:
            min(idle, key=operator.attrgetter("deadline")).expire()

    @property
    def crowded(self) -> bool:
        """Whether more connections have a request than may."""
        return sum(handler.busy for handler in list(self.handlers)) > self.max_connections

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log it. socketserver's own prints a traceback, and waits where nobody reads it."""
        self.log_rarely(f"a connection failed: {sys.exc_info()[1]!r}")

    def log_rarely(self, problem: str) -> None:
        """Log what could happen with each connection, once a minute at most."""
        if time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + 60
            logger.error(problem)

    def service_actions(self) -> None:
        """Sweep twice a second: end waits that are over their deadline, and answers whose client
        has left.
        """
        now = time.monotonic()
        if now < self._next_sweep:
            return
        for connection in self.left:
            connection.close()
        self.left = self.leaving
        self.leaving = []
        for handler in list(self.handlers):
            if handler.deadline < now:
                handler.expire()
            if (requests := handler.waiting) and handler.hung_up():
                with contextlib.suppress(OSError):
                    handler.connection.shutdown(socket.SHUT_RDWR)  # the handler's next write fails
                for request in requests:
                    self.scheduler.cancel(request)
        if now > self._next_trim:  # a large body's memory would stay with this process
            self._next_trim = now + 20
            return_freed_memory()
        self._next_sweep = now + 0.5

    def figures(self) -> dict[str, tuple[str, float | Mapping[str, float]]]:
        """What /metrics tells beside histograms: a name to its help and its value, or its values
        by label.
        """
        scheduler = self.scheduler
        statistics = scheduler.statistics
        prompt_tokens = statistics.sums["request_prompt_tokens"]
        generated = statistics.sums["request_generation_tokens"]
        finished = statistics.finished.items()
        answered = dict(self.responses).items()
        ended = {f',finished_reason="{outcome}"': n for outcome, n in finished}
        responses = {f',path="{path}",status="{status}"': n for (path, status), n in answered}
        return {
            "num_requests_running": ("Requests in a slot.", scheduler.busy),
            "num_requests_waiting": ("Requests that wait for a slot.", len(scheduler.queue)),
            "slots": ("Requests that can run together.", len(scheduler.slots)),
            "http_connections": ("Open connections.", len(self.handlers)),
            "kv_cache_usage_perc": (
                "Part of the KV cache that is reserved; 1 is all.",
                scheduler.kv_cache_use,
            ),
            "requests_accepted_total": ("Requests that were queued.", statistics.accepted),
            "prompt_tokens_total": ("Prompt tokens of requests that got a token.", prompt_tokens),
            "prefix_cache_queries_total": ("The same, under vLLM's other name.", prompt_tokens),
            "prefix_cache_hits_total": (
                "Those that the KV cache had already.",
                statistics.cached_tokens,
            ),
            "generation_tokens_total": ("Tokens generated.", generated),
            "request_success_total": ("Requests that ended, by outcome.", ended),
            "http_responses_total": (
                "Answers by path and status; 499: the client left.",
                responses,
            ),
        }

    @property
    def under_way(self) -> int:
        """Requests whose answer is not delivered yet."""
        return sum(bool(handler.waiting) for handler in list(self.handlers))


# ==================================================================================================
# Check
# ==================================================================================================


class EngineCheck:
    """Finds out, through its contract alone, whether an engine is right, and how fast it is.

    A difference of two texts is no error where the two tokens are nearly tied: below float32, other
    rows or another cut of the prompt may exchange them.
    """

    ANSWER = 4  # tokens of a text
    PROMPTS = 5  # a prime: slots that are exchanged by mistake have different ones
    SLOTS_SECONDS = 10  # after which no more slots are checked one by one
    REFERENCE_SECONDS = 60  # after which the reference is asked no more

    SEEN = SamplingParams(temperature=0, logprobs=5)
    GREEDY = SamplingParams(temperature=0)
    SEEDED = SamplingParams(temperature=1, seed=1)
    SAMPLED = SamplingParams(temperature=0.7, top_p=0.9)

    def __init__(self, engine: Engine, tokenizer: Tokenizer, tie: float) -> None:
        """`tie`: by how much the log-probabilities of tied tokens may differ."""
        self.engine = engine
        self._tie = tie
        self.wrong: list[str] = []
        self._rows = [("", "", ""), ("---", "---", "---")]
        self._start = list(tokenizer.vocabulary.start)
        self._words = 9 * tokenizer.encode_text(__doc__ or "")  # more than a prompt takes
        self._seconds: list[float] = []  # that each decode step of the last texts took
        self._ties = 0

    def add(self, what: str, found: str, right: bool | None = None) -> None:
        """Add a row; `right` is None where nothing can be wrong."""
        outcome = {None: "", True: "right", False: "WRONG"}[right]
        self._rows.append((outcome, what, found))
        if right is False:
            self.wrong.append(what)

    def __str__(self) -> str:
        """A table in Markdown, and the verdict."""
        width = max(len(what) for _, what, _ in self._rows)
        lines = [f"| {right:5} | {what:{width}} | {found} |" for right, what, found in self._rows]
        verdict = f"WRONG: {'; '.join(self.wrong)}" if self.wrong else "RIGHT"
        return "\n".join([*lines, "", verdict])

    def run(self, progress: Progress) -> None:
        """Find out all that needs no reference, and what a reference is asked for."""
        checks = (self._slots, self._prefixes, self._seed, self._follow, self._speed)
        for number, check in enumerate(checks):
            progress("checking", number / len(checks))
            for slot in range(self.engine.max_batch_size):
                self.engine.reserve(slot, 0)
            check()
        self.add("near ties exchanged", str(self._ties))
        self.add("tokens are drawn", self.engine.sampling)

    def _prompt(self, number: int, length: int) -> list[int]:
        """So many tokens of this file's first words, for each number from another place."""
        return [*self._start, *self._words[97 * number :]][:length]

    def _texts(
        self,
        prompts: Mapping[int, list[int]],
        params: SamplingParams,
        count: int = ANSWER,
        held: int = 0,
        read: int | None = None,
    ) -> dict[int, list[Token]]:
        """What each slot draws, all together, after one by one has read its prompt.

        `held`: how much of it a slot holds. `read`: how much of it is read before the first draw;
        the rest is decoded, whatever was drawn.
        """
        engine = self.engine
        sampler = Sampler(params)
        texts: dict[int, list[Any]] = {slot: [] for slot in prompts}
        for slot, prompt in prompts.items():
            if not (engine.reserve(slot, held) and engine.reserve(slot, len(prompt) + count)):
                raise MemoryError(f"no room for {len(prompt) + count} tokens in slot {slot}")
            begin = prompt[:read]
            piece = engine.prompt_chunk or len(begin)
            for at in range(held, len(begin), piece):
                last = at + piece >= len(begin)
                work = Work(slot, begin[at : at + piece], at, sampler if last else None)
                (result,) = engine.step([work])
            texts[slot].append(result.token)
        self._seconds.clear()
        for number in range(count - 1):
            batch = []
            for slot, prompt in prompts.items():
                at = len(prompt[:read]) + number
                token = prompt[at] if at < len(prompt) else texts[slot][-1].id
                batch.append(Work(slot, [token], at, sampler))
            began = time.perf_counter()
            results = engine.step(batch)
            self._seconds.append(time.perf_counter() - began)
            for slot, result in zip(prompts, results):
                texts[slot].append(result.token)
        return texts

    def _same(self, text: list[Token], expected: list[Token]) -> bool:
        """Whether each token is the expected one, and as likely, where that is known.

        Those after a tie do not count.
        """
        for token, other in zip(text, expected, strict=True):
            best = other.likely[0][1]
            apart = best - dict(other.likely).get(token.id, -math.inf)
            if token.likely:
                apart = max(apart, abs(best - token.likely[0][1]))
            if apart > self._tie:
                return False
            if token.id != other.id:
                self._ties += 1
                return True
        return True

    def _slots(self) -> None:
        """Each slot alone, then all together, their neighbours with other prompts."""
        kinds = [self._prompt(number, 36 + number) for number in range(self.PROMPTS)]
        prompts = dict(zip(range(self.engine.max_batch_size), itertools.cycle(kinds)))
        alone: dict[int, list[Token]] = {}
        end = time.monotonic() + self.SLOTS_SECONDS
        for slot, prompt in prompts.items():
            if slot < self.PROMPTS or time.monotonic() < end:
                alone |= self._texts({slot: prompt}, self.SEEN)
        together = self._texts(prompts, self.GREEDY)
        for how, texts in ("alone", alone), ("together", together):
            wrong = []
            for slot, text in texts.items():
                if not self._same(text, alone[slot % self.PROMPTS]):
                    wrong.append(str(slot))
            found = f"{len(texts)} slots"
            if wrong:
                found += f", not in {', '.join(wrong)}"
            self.add(f"the same text in every slot, {how}", found, not wrong)

    def _prefixes(self) -> None:
        """A prompt whose beginning its slot holds gives what it gives where the rest is decoded.

        A card itself may read a whole prompt in pieces.
        """
        engine = self.engine
        slot = 1 if engine.max_batch_size > engine.kv_pools else 0
        common = -(-64 // engine.resume_align) * engine.resume_align
        prompt = self._prompt(0, common + 16)
        other = self._prompt(1, common + 16)
        expected = self._texts({0: prompt}, self.SEEN, 24, read=common)[0][16:]
        ways = {
            "from a prompt in pieces": prompt[:common],
            "from a prefix left in its slot": prompt[:common] + other[common:],
            "from a prefix of another slot": other,
        }
        for way, before in ways.items():
            what = f"the same text {way}"
            if not engine.prompt_chunk or (before is other and not slot):
                self.add(what, "not done here")
                continue
            self._texts({slot: before}, self.GREEDY, 1)
            if before is other:
                engine.reserve(slot, 0)
                engine.copy(0, slot, common)
            text = self._texts({slot: prompt}, self.SEEN, 8, held=common)[slot]
            self.add(what, f"of {common} tokens", self._same(text, expected))

    def _seed(self) -> None:
        """The same request twice."""
        prompts = {0: self._prompt(2, 30)}
        first = self._texts(prompts, self.SEEDED)
        second = self._texts(prompts, self.SEEDED)
        self.add("the same text from a seed", "twice", first == second)

    def _follow(self) -> None:
        """What the reference is asked for: the most likely tokens in a text, by slot."""
        slots = range(min(self.engine.max_batch_size, 8))
        prompts = {slot: self._prompt(slot, 48) for slot in slots}
        self._followed = self._texts(prompts, self.SEEN, count=32, read=16)

    def compare(self, reference: Engine) -> None:
        """Compare with what the CPU engine finds in the text.

        tt-metal's PERF.md has 77 % and 96 % as the least, with weights in bfloat4.
        """
        pairs: list[tuple[Token, Token]] = []
        end = time.monotonic() + self.REFERENCE_SECONDS
        for slot, text in self._followed.items():
            if pairs and time.monotonic() > end:
                break
            prompt = self._prompt(slot, 48)
            reference.reserve(0, 48)
            work = Work(0, prompt, 0, None, Scores(prompt[1:], 5))
            (result,) = reference.step([work])
            pairs += zip(text, result.scores[15:], strict=True)  # those that follow 16 tokens
        same = among = 0
        spread = spread_of_cpu = 0.0  # of the five log-probabilities
        for token, of_cpu in pairs:
            likeliest = token.likely[0][0]
            same += likeliest == of_cpu.likely[0][0]
            among += likeliest in dict(of_cpu.likely)
            spread += token.likely[0][1] - token.likely[-1][1]
            spread_of_cpu += of_cpu.likely[0][1] - of_cpu.likely[-1][1]
        first = same / len(pairs)
        five = among / len(pairs)
        scale = spread / spread_of_cpu
        self.add("the CPU's most likely token", f"{first:.1%} of {len(pairs)}", first > 0.6)
        self.add("one of the CPU's five likeliest", f"{five:.1%}", five > 0.9)
        self.add("the CPU's scale of log-probabilities", f"{scale:.2f}", 0.8 < scale < 1.25)

    def _speed(self) -> None:
        """The first token after a prompt, and the steps of more and more users."""
        for length in (128, min(2000, self.engine.max_seq_len - 8)):
            began = time.perf_counter()
            self._texts({0: self._prompt(3, length)}, self.SAMPLED, 1)
            seconds = time.perf_counter() - began
            self.add(f"first token, prompt of {length}", f"{seconds:.3f} s")
            if seconds > 2:  # the longer one would take half a minute
                break
        for users in sorted({min(users, self.engine.max_batch_size) for users in (1, 8, 32)}):
            prompts = {slot: self._prompt(slot, 4) for slot in range(users)}
            self._texts(prompts, self.SAMPLED, 8)
            seconds = sorted(self._seconds)[len(self._seconds) // 2]
            found = f"{users / seconds:.1f} tokens/s, {1000 * seconds:.1f} ms a step"
            self.add(f"users: {users}", found)


# ==================================================================================================
# CLI
# ==================================================================================================

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPT_SIGNAL = signal.SIGUSR1  # to the main thread
DRAIN_SECONDS = 60  # time for the requests under way when the server is asked to stop
DEFAULT_MAX_SEQ_LEN = 8192

terminal = logging.getLogger("terminal")  # for the banner and the progress of the load


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An option's type: a whole number from low to high."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, not {text!r}"
            )
        return int(text)

    return parse


def origin(text: str) -> str:
    """An option's type: a site as browsers and apps name it in the header Origin."""
    if not (match := re.fullmatch(r"(\*|null|[A-Za-z][\w+.-]*://[^/\s]*)/?", text)):
        raise argparse.ArgumentTypeError(
            f"must be *, null, or scheme and host as in https://app.example, not {text!r}"
        )
    return match[1]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; end the program if it is wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\nThe rooms of this file")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="log prompts, refusals, requests to /health, and what ttnn logs",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="say whether the card is right and how fast, instead of serving; no card: the CPU",
    )
    parser.add_argument("--version", action="version", version=f"tt_api_server {__version__}")
    add_model_options(parser)
    add_network_options(parser)
    add_card_options(parser)
    add_cpu_options(parser)
    return parser.parse_args(arguments)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What is served, and to how many at once."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="DIR",
        help="or OWNER/NAME at Hugging Face (default: $HF_MODEL, $LLAMA_DIR, a demo)",
    )
    add("--served-model-name", metavar="NAME", help="its name in /v1 (default: its folder's)")
    add(
        "--device",
        choices=("auto", "tt", "cpu"),
        default="auto",
        help="auto: the card if there is one, else the CPU",
    )
    add(
        "--max-batch-size",
        type=whole_number(1, 1024),
        default=32,
        metavar="N",
        help="requests that run together (default: 32)",
    )
    add(
        "--max-seq-len",
        type=whole_number(32, 10**6),
        metavar="N",
        help="tokens of prompt and answer (default: 8192)",
    )
    add(
        "--max-queue",
        type=whole_number(0, 10**6),
        default=256,
        metavar="N",
        help="requests that wait (default: 256)",
    )


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Who may ask, and where."""
    add = parser.add_argument_group("network").add_argument
    add(
        "--port",
        type=whole_number(0, 65535),
        default=8080,
        help="0 is any free port (default: 8080)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, only this machine)",
    )
    add(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("TT_API_KEY"),
        help="better in $TT_API_KEY: `ps` shows this",
    )
    add(
        "--allow-origin",
        action="append",
        type=origin,
        default=[],
        metavar="URL",
        help="pages that may ask; * is any",
    )


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """How a card runs the model."""
    variables = "MESH_DEVICE: the board, TT_METAL_HOME: the tt-metal checkout"
    add = parser.add_argument_group(f"card ({variables})").add_argument
    add(
        "--accuracy",
        action="store_true",
        help="tt-metal's settings for accuracy instead of performance",
    )
    add(
        "--data-parallel",
        type=whole_number(1, 32),
        default=1,
        metavar="N",
        help="copies of the model (default: 1)",
    )
    add("--no-trace", action="store_true", help="run without traces, for debugging; slower")
    add(
        "--trace-region-size",
        type=whole_number(1, 10**9 - 1),
        default=0,
        metavar="N",
        help="bytes for traces",
    )


def add_cpu_options(parser: argparse.ArgumentParser) -> None:
    """How the CPU runs the model."""
    add = parser.add_argument_group("CPU").add_argument
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="arithmetic; auto is the fastest",
    )
    add(
        "--threads",
        type=whole_number(1, 1024),
        default=0,
        metavar="N",
        help="default: all cores, or one for a tiny model",
    )


def bind(options: argparse.Namespace) -> ApiServer:
    """Listen, before anything is loaded.

    Raises UserError if the address or the port is not available.
    """
    # an empty host means all addresses; an empty key would mean no key
    if not options.host or options.api_key == "":
        raise UserError(
            "--host, --api-key or TT_API_KEY is empty: give it a value, or leave it out"
        )
    try:
        server = ApiServer(options.host, options.port)
    except OSError as error:
        raise UserError(
            f"cannot listen on {options.host}, port {options.port} ({error.strerror or error}): "
            "choose another --host or --port (0 is any free port)"
        ) from error
    server.api_key = options.api_key
    server.allowed_origins = options.allow_origin
    # One connection, which is one open file, for each request that runs or waits, and some to
    # spare.
    wanted = options.max_batch_size * options.data_parallel + options.max_queue + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below `hard`
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted + 128, hard)), hard))
    server.max_connections = max(
        min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128), 16
    )
    return server


def start_logging(verbose: bool) -> queue.Queue[Any]:
    """Write log and banner in a thread, so that a blocked terminal stops nothing; returns the lines
    still to write.
    """
    logging.raiseExceptions = False  # losing a line is no error
    lines: queue.Queue[Any] = queue.Queue(10_000)  # lines beyond are lost
    for source, line in ((logger, "%(asctime)s %(message)s\n"), (terminal, "%(message)s")):
        handler = logging.handlers.QueueHandler(lines)
        handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
        source.addHandler(handler)
        source.setLevel(logging.DEBUG if verbose else logging.INFO)
        source.propagate = False
    output = logging.StreamHandler()
    output.terminator = ""
    logging.handlers.QueueListener(lines, output).start()
    return lines


def progress_on_terminal() -> Progress:
    """Show how far the load is: a progress bar on a terminal, elsewhere one line for each stage."""
    live = sys.stderr is not None and sys.stderr.isatty()
    began = time.monotonic()
    last_stage = ""

    def show(stage: str, done: float | None = None) -> None:
        nonlocal last_stage
        if live:
            bar = "" if done is None else f" [{'#' * round(30 * done):30}] {done:4.0%}"
            # \x1b[K clears the rest of the line
            line = f"\r\x1b[K  {stage}{bar}  {time.monotonic() - began:.0f} s"
            terminal.info(line + "\n" * (stage == "ready"))
        elif stage != last_stage:
            terminal.info(f"  {stage}\n")
        last_stage = stage

    return show


def complete_options(options: argparse.Namespace, found: Checkpoint | None) -> None:
    """Set --device and --max-seq-len.

    Raises UserError if an option does not fit, or the card is missing.
    """
    longest = (found.config if found else DEMO_CONFIG).max_position
    options.max_seq_len = options.max_seq_len or min(longest, DEFAULT_MAX_SEQ_LEN)
    if options.max_seq_len > longest:
        raise UserError(
            f"--max-seq-len is {options.max_seq_len}, and the model's limit is {longest}: lower it"
        )
    if options.device == "auto":
        options.device = "tt" if found and card_present() else "cpu"
    if options.device == "cpu":
        if (
            options.accuracy
            or options.no_trace
            or options.trace_region_size
            or options.data_parallel > 1
        ):
            card_options = "--accuracy, --data-parallel, --no-trace and --trace-region-size"
            raise UserError(
                f"{card_options} are for a card, and this model runs on the CPU: leave them out"
            )
        return
    if not card_present():
        raise UserError(
            "found no Tenstorrent card in /dev/tenstorrent: install its driver, or use --device cpu"
        )
    if found is None:
        raise UserError(
            "--device tt needs a model: add --model, as in --model ~/models/Llama-3.1-8B-Instruct"
        )
    if options.dtype != "auto" or options.threads:
        raise UserError(
            "--dtype and --threads are for the CPU, and this model runs on a card: leave them out"
        )
    find_tt_metal()


def load(
    options: argparse.Namespace, found: Checkpoint | None, progress: Progress
) -> tuple[Checkpoint, Tokenizer, TorchEngine | TTEngine]:
    """Load the tokenizer, and the model where the options say."""
    if found and found.repository:
        download_weights(found, progress)
    progress("importing PyTorch")
    import_torch()
    checkpoint = found or demo_checkpoint(progress)
    progress("loading the tokenizer")
    tokenizer = open_tokenizer(checkpoint)
    if options.device == "cpu":
        size = (options.max_batch_size, options.max_seq_len, progress)
        engine = TorchEngine(checkpoint, *size, dtype=options.dtype, threads=options.threads)
        return checkpoint, tokenizer, engine
    card = Card(
        checkpoint,
        options.max_batch_size,
        options.data_parallel,
        options.max_seq_len,
        options.trace_region_size,
        options.accuracy,
        options.verbose,
    )
    return checkpoint, tokenizer, TTEngine(card, progress, not options.no_trace)


def load_to_serve(
    server: ApiServer, options: argparse.Namespace, found: Checkpoint | None, progress: Progress
) -> Engine:
    """Load what is served. The scheduler's thread calls this."""
    checkpoint, tokenizer, engine = load(options, found, progress)
    server.folder = str(checkpoint.folder)
    if isinstance(engine, TTEngine):
        server.note = engine.note
    server.served = Model(
        server.model,
        tokenizer,
        Grammars(tokenizer.token_bytes),
        checkpoint.defaults,
        engine.max_seq_len,
        engine.scores_prompts,
        KeptItems(),
    )
    return engine


def announce(server: ApiServer) -> None:
    """Say that the model is loaded."""
    url = server.url
    # a garbage collection of all loaded modules would stop all threads for 0.2 s, again and again
    gc.freeze()
    endpoints = "\n".join(f"  {route.method:4} {url}{path}" for path, route in ROUTES.items())
    key = " -H 'Authorization: Bearer KEY'" if server.api_key else ""
    terminal.info(f"""
Server ready on {url} ({server.scheduler.device})

Endpoints:
{endpoints}

Try it:
  curl -s {url}/chat{key} -H 'Content-Type: application/json' -d '{{"prompt": "What is machine learning?"}}'

Press CTRL+C to stop the server
""")
    notify_systemd("READY=1")


def start_thread(target: Callable[..., None], *arguments: Any) -> None:
    """Call `target` in a thread that ends with the program."""
    threading.Thread(target=target, args=arguments, daemon=True).start()


def serve(options: argparse.Namespace) -> int:
    """Bind, load, serve, stop; returns the exit status."""
    server = bind(options)
    scheduler = server.scheduler = Scheduler(options.max_queue)
    start_thread(server.serve_forever)
    start_thread(stop_on_signals, server)
    found = find_checkpoint(options.model)
    complete_options(options, found)
    server.model = options.served_model_name or (found.name if found else DEMO_NAME)
    server.folder, server.note = (str(found.folder), "") if found else ("", DEMO_NOTE)
    about = f"Model:  {server.model}, {server.folder or server.note}\nHealth: {server.url}/health, also during the load"
    terminal.info(f"Language model server on Tenstorrent\n{'=' * 60}\n{about}\n\n")
    if not server.on_loopback and not server.api_key:
        logger.warning(
            "anyone who can reach this machine can use this server: set TT_API_KEY to require a key"
        )
    sys.setswitchinterval(0.0005)  # or each new connection may wait 5 ms for a thread that computes
    if supervised := "NOTIFY_SOCKET" in os.environ:
        start_thread(exit_if_stuck, scheduler)
    loading = functools.partial(load_to_serve, server, options, found)
    ready = functools.partial(announce, server)
    scheduler.run(loading, progress_on_terminal(), ready)
    if scheduler.slots and not supervised:
        # if the engine has failed, /health reports it until the user stops the server
        scheduler.wait_for_stop()
    while server.under_way and not server.cut_short:
        time.sleep(0.05)
    logger.info("Stopped.")
    return 1 if scheduler.error else 130 if server.cut_short else 0


def run_check(options: argparse.Namespace) -> int:
    """Check the engine and print what was found; returns 1 if it is wrong."""
    start_thread(stop_check_on_signals)
    found = find_checkpoint(options.model)
    complete_options(options, found)
    if options.max_seq_len < 512:
        raise UserError(f"--max-seq-len is {options.max_seq_len}, and --check needs 512: raise it")
    if options.device == "cpu" and options.dtype == "auto":
        options.dtype = "float32"  # in which all ways of computing agree
    progress = progress_on_terminal()
    checkpoint, tokenizer, engine = load(options, found, progress)
    check = EngineCheck(engine, tokenizer, 0.001 if options.dtype == "float32" else 0.5)
    try:
        with contextlib.closing(engine):
            check.run(progress)
            if options.device == "cpu":
                check.compare(engine)
        if options.device != "cpu":
            compare_with_cpu(check, checkpoint, progress)
    except Exception as error:
        logger.debug("the check failed", exc_info=error)
        check.add(type(error).__name__, printable(str(error)), False)
    progress("ready", 1.0)
    versions = [__version__, f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if options.device != "cpu":
        versions += [compare_versions(find_tt_metal()[0]).partition(": ")[0]]
    names = "max_batch_size max_seq_len dtype accuracy data_parallel no_trace trace_region_size"
    chosen = {name: getattr(options, name) for name in names.split()}
    check.add("model", f"{checkpoint.name} on {engine.device}")
    check.add("versions", ", ".join(versions))
    check.add("options", ", ".join(f"{name} {value}" for name, value in chosen.items() if value))
    print(check, flush=True)
    return 1 if check.wrong else 0


def compare_with_cpu(check: EngineCheck, checkpoint: Checkpoint, progress: Progress) -> None:
    """Compare what a card gave with the CPU engine, if the machine has the memory for it."""
    weights = sum(math.prod(shape) for _, shape in checkpoint.config.weights().values())
    needed = 2.4 * weights  # bytes: 2 for each, and some to spare
    (kilobytes,) = re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
    free = 1024 * int(kilobytes)
    if free < needed:
        lacks = f"it takes {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} are free"
        check.add("no comparison with the CPU", lacks)
    else:
        check.compare(TorchEngine(checkpoint, 1, 512, progress))


def exit_if_stuck(scheduler: Scheduler) -> None:
    """End the process if a step hangs, so that systemd starts another one, which can reset the
    card.
    """
    while not scheduler.error:
        time.sleep(1)
    logger.error(scheduler.error)
    # if steps fail and do not hang, the main thread now closes the card and ends the process
    time.sleep(10)
    os._exit(1)


def stop_on_signals(server: ApiServer) -> None:
    """Stop at a signal, even if the main thread hangs.

    A second one, or DRAIN_SECONDS, cuts the requests short.
    """
    scheduler = server.scheduler
    signal.sigwait(STOP_SIGNALS)
    notify_systemd("STOPPING=1")
    if scheduler.state == "healthy":
        under_way = f"Requests under way: {server.under_way}"
        logger.info(f"Stopping. {under_way}. Press CTRL+C again to cut them short.")
        scheduler.stop(drain=True)
        threading.Timer(DRAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()
        signal.sigwait(STOP_SIGNALS)
    logger.info("Stopping within 10 seconds.")
    server.cut_short = server.under_way > 0
    scheduler.stop(drain=False)
    interrupt_main_thread()
    os._exit(1 if scheduler.error else 130)


def stop_check_on_signals() -> None:
    """Stop --check at a signal."""
    signal.sigwait(STOP_SIGNALS)
    interrupt_main_thread()
    os._exit(130)


def interrupt_main_thread() -> None:
    """Let the main thread unwind, which closes the card; it has 10 seconds to end the program."""
    main_thread = threading.main_thread().ident or 0
    for _ in range(10):  # one exception may be lost in the code that it comes to
        if may_be_interrupted(sys._current_frames()[main_thread]):
            signal.pthread_kill(main_thread, INTERRUPT_SIGNAL)
        time.sleep(1)


def may_be_interrupted(frame: types.FrameType | None) -> bool:
    """Whether a thread loads or checks, and does not open or close the card, which would stay
    open.
    """
    stack = {caller.f_code for caller, _ in traceback.walk_stack(frame)}
    loads = {function.__code__ for function in (load, run_check, find_checkpoint)}
    holds = {function.__code__ for function in (Card._open_mesh, TTEngine.close)}
    return bool(stack & loads) and not stack & holds


def interrupt(_: int, frame: types.FrameType | None) -> None:
    """The handler of INTERRUPT_SIGNAL."""
    if may_be_interrupted(frame):
        raise KeyboardInterrupt


def notify_systemd(state: str) -> None:
    """Tell systemd the state, if it started this with Type=notify (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(state.encode(), re.sub("^@", "\0", address))
        except OSError as error:
            logger.warning("could not send %s to systemd at NOTIFY_SOCKET: %s", state, error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Exit status: 0 stopped, 1 the engine failed or is wrong, 2 a UserError, 130 cut short.
    """
    # Every thread inherits this and leaves the signals to stop_on_signals, which waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(INTERRUPT_SIGNAL, interrupt)
    options = parse_arguments(arguments)
    lines = start_logging(options.verbose)
    try:
        status = run_check(options) if options.check else serve(options)
    except KeyboardInterrupt:
        status = 130
    except UserError as error:
        terminal.error(f"\nerror: {error}\n")
        status = 2
    deadline = time.monotonic() + 1
    while lines.unfinished_tasks and time.monotonic() < deadline:
        time.sleep(0.01)
    return status


if __name__ == "__main__":
    # Python's own exit would wait for threads, and ttnn would print pages about objects that still
    # exist.
    os._exit(main())
