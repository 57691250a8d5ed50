#!/usr/bin/env python3
"""tt_api_server: serve a language model over HTTP, on a Tenstorrent card or on the CPU.

    python3 tt_api_server.py --port 8080                     # without a model: a tiny demo, trained in seconds
    python3 tt_api_server.py --model ~/models/Llama-3.1-8B-Instruct

    curl -s localhost:8080/chat -H 'Content-Type: application/json' -d '{"prompt": "What is machine learning?"}' | jq

The model is loaded once and stays loaded. Requests share each step of the engine (continuous batching).

    GET  /                      a chat page for browsers
    GET  /health                state, model, device and load
    POST /chat                  {"prompt": ...} or {"messages": [...]}; optional: system, max_tokens, temperature,
                                top_p, top_k, seed, stop, stream, chat_template_kwargs
    POST /v1/chat/completions   OpenAI's API; also /v1/responses, /v1/completions and /v1/models, and vLLM's /tokenize
                                and /detokenize
    GET  /metrics               metrics for Prometheus

The rooms of this file, top to bottom; each uses only those above it:

    Errors         one exception for the user at the terminal, one for the HTTP client
    Checkpoint     find the model's files and read its configuration
    Text           messages to token ids, token ids to text
    Tools          tool calls in an answer, and grammars for calls and structured output
    Sampling       logits to the next token
    Engine         the contract of every engine: tokens in, tokens out
    CPU engine     the model in PyTorch
    Card engine    the model on Tenstorrent cards, through tt-metal's Generator
    Demo model     a tiny Llama for a start without a model
    Scheduler      the one thread that runs the engine: continuous batching, prefix reuse, statistics
    Dialects       JSON to a Request, a Request to JSON
    Page           the chat page
    HTTP           sockets, routes, errors, metrics
    CLI            options, banner, signals, start and stop

One object, Request, goes down through them and comes back up:

    socket - ApiHandler - Dialect.read - Tokenizer - Scheduler.submit - queue
                                                                          |
    socket - ApiHandler - Dialect.whole - TextStream - Request - Scheduler loop - Engine

A handler's thread owns its socket and its text; the scheduler's thread owns the engine and the token ids.
"""

from __future__ import annotations

import argparse
import ast
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import ctypes
import difflib
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import ipaddress
import itertools
import json
import logging
import logging.handlers
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
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F

if sys.version_info < (3, 10):  # noqa: UP036
    raise SystemExit(f"error: this is Python {sys.version.split()[0]}: use Python 3.10 or later")

__version__ = "2.0.0"

logger = logging.getLogger("tt_api_server")

# ======================================================================================================================
# Errors
# ======================================================================================================================


class UserError(Exception):
    """For the user at the terminal: one plain sentence that says what is wrong and what to do."""


class ApiError(Exception):
    """For the HTTP client: a status, one plain sentence, and OpenAI's `param` and `code` if the error has them."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


def printable(text: str | None) -> str:
    """Shorten `text` and replace control characters, for logs and errors."""
    text = text or "-"
    return "".join(c if c.isprintable() else "?" for c in (text if len(text) <= 100 else f"{text[:97]}..."))


def shown(value: Any) -> str:
    """Format a JSON value for an error message."""
    return printable(json.dumps(value, ensure_ascii=False))


def as_list(value: Any) -> list[Any]:
    """A list as it is, and anything else as the one item of a list."""
    return value if isinstance(value, list) else [value]


def import_torch() -> None:
    """Import `torch` and `F` late: it takes seconds, and most user errors can be reported before."""
    global torch, F
    # A waiting OpenMP thread spins, which makes a step up to ten times slower if another program needs the core. Spin
    # only for a short time, then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # NumPy is not used here
        try:
            import torch
            import torch.nn.functional as F
        except ImportError as error:
            cure = "activate the virtual environment first (. .venv/bin/activate) or pip install -r requirements.txt"
            raise UserError(f"PyTorch cannot be imported ({error}): {cure}") from error


# ======================================================================================================================
# Checkpoint
# ======================================================================================================================

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
}
NAME_FOLDER = "name a folder with config.json, model.safetensors or its index, and tokenizer.json"
NAME_ANOTHER = f"name a text model of the family {', '.join(FAMILIES)} in bfloat16"
NAME_ANOTHER += ", not a quantized copy (GPTQ, AWQ, FP8, MLX)"

# The settings of config.json that change what transformers computes, and the values that are supported. If a
# setting is absent, the first value is meant, as in transformers.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "quantization": (None,),  # MLX's name
    "rope_type": ("default", "llama3"),
    "partial_rotary_factor": (1.0, None),
}
# transformers' defaults for what config.json leaves out: of all families, and of each.
DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
FAMILY_SETTINGS = (
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_key_value_heads",
    "head_dim",
)
FAMILY_DEFAULTS = {  # None: it follows from the others
    "llama": (32000, 11008, 2048, None, None),
    "mistral": (32000, 14336, 131072, 8, None),
    "qwen2": (151936, 22016, 32768, 32, None),
    "qwen3": (151936, 22016, 32768, 32, 128),
}
# The settings of generation_config.json that are a request's defaults: lowest and highest value.
GENERATION = {
    "temperature": (0.0, 2),
    "top_p": (0.0, 1),
    "top_k": (0, math.inf),  # a whole number
    "min_p": (0.0, 1),
    "repetition_penalty": (0.01, 100),
}
# Llama 3.1's stretching of the rotary wavelengths
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
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
    rope_scaling: dict[str, float] | None  # ROPE_SCALING
    tied: bool  # the embedding is the output matrix, if the checkpoint has no other

    @staticmethod
    def read(config: dict[str, Any]) -> ModelConfig:
        """Read the content of a config.json. Raises UserError, and KeyError or ValueError if it is damaged."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5; 4
        settings = {"rope_type": rope.get("type", "default"), **config, **rope}
        for name, values in SUPPORTED.items():
            if (value := settings.get(name, values[0])) not in values:
                wanted = " or ".join(map(shown, values))
                raise UserError(f"{name} is {shown(value)}, and only {wanted} is supported: {NAME_ANOTHER}")
        family = settings["model_type"]
        settings = DEFAULTS | dict(zip(FAMILY_SETTINGS, FAMILY_DEFAULTS[family])) | settings
        dim, heads = settings["hidden_size"], settings["num_attention_heads"]
        # Attention has no sliding window here, so the context ends where a window would begin to slide.
        slides = settings.get("use_sliding_window", family == "mistral")
        window = settings.get("sliding_window", 4096) if slides else None
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
            "max_position": min(settings["max_position_embeddings"], window or math.inf),
        }
        scaling = {name: rope[name] for name in ROPE_SCALING} if settings["rope_type"] == "llama3" else {}
        for name, value in {**numbers, **scaling}.items():
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{name} is {shown(value)}")
        tied = bool(settings.get("tie_word_embeddings"))
        return ModelConfig(family, **numbers, rope_scaling=scaling or None, tied=tied)

    def weights(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Meta's name of every weight, with Hugging Face's name and the shape."""
        sizes = {"vocabulary": self.vocab_size, "dim": self.dim, "ffn": self.ffn_dim, "head": self.head_dim}
        sizes |= {"q": self.n_heads * self.head_dim, "kv": self.n_kv_heads * self.head_dim}
        return {
            meta.format(i): (hf.format(i), tuple(sizes[size] for size in shape.split()))
            for meta, hf, shape in WEIGHTS + FAMILIES[self.family]
            for i in range(self.n_layers if "{}" in meta else 1)
        }


def config_of_params(params: dict[str, Any]) -> dict[str, Any]:
    """Meta's params.json as the config.json of the same model. Raises UserError for a setting that is unknown."""
    dim, heads, layers = params.pop("dim"), params.pop("n_heads"), params.pop("n_layers")
    ffn_dim = int(params.pop("ffn_dim_multiplier", 1.0) * int(8 * dim / 3))
    multiple, scaled = params.pop("multiple_of", 256), params.pop("use_scaled_rope", False)
    if (vocabulary := params.pop("vocab_size", LLAMA3_VOCABULARY)) != LLAMA3_VOCABULARY:
        raise UserError(f"vocab_size is {shown(vocabulary)}, and only Llama 3 is supported in Meta's layout")
    # params.json does not tell Llama 3.2's scaling factor from 3.1's and 3.3's. The width does: the text models of 3.2
    # are 2048 and 3072 wide, all others 4096 or more.
    factors = (32.0 if dim <= 3072 else 8.0, 1.0, 4.0, 8192)
    config = {
        "model_type": "llama",
        "vocab_size": LLAMA3_VOCABULARY,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": params.pop("n_kv_heads", None),
        "intermediate_size": -(-ffn_dim // multiple) * multiple,
        "rms_norm_eps": params.pop("norm_eps", 1e-5),
        "rope_theta": params.pop("rope_theta", 500000.0),
        "rope_scaling": {"rope_type": "llama3", **dict(zip(ROPE_SCALING, factors))} if scaled else None,
        "max_position_embeddings": 131072 if scaled else 8192,
        "tie_word_embeddings": True,
    }
    if unknown := params.keys() - {"max_batch_size", "max_seq_len"}:
        raise UserError(f"params.json has {min(unknown)}, which is not supported: {NAME_ANOTHER}")
    return config


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model; `open_weights` reads its weights."""

    files: Sequence[Path]  # with the weights: one .pth in Meta's layout, or .safetensors in Hugging Face's
    hf_folder: Path | None  # with config.json
    config: ModelConfig
    name: str
    stop_tokens: frozenset[int]  # that end an answer, by the model's configuration
    defaults: Mapping[str, float]  # of a request, by generation_config.json: see GENERATION

    @property
    def folder(self) -> Path:
        """The folder of the weights."""
        return self.files[0].parent

    @property
    def tokenizer_model(self) -> Path | None:
        """The checkpoint's own tokenizer.model; None if it has none, and llama-models' copy is to be used."""
        paths = (self.folder / "tokenizer.model", self.folder / "original" / "tokenizer.model")
        return next((path for path in paths if path.is_file()), None)

    def open_weights(self) -> Callable[[str], torch.Tensor]:
        """Map the files and return a reader, which takes Meta's name of a weight and gives the tensor, still on disk.

        Checks the presence and shape of every tensor first. The reader gives the embedding for a tied model's
        output.weight. Rotary pairs are half a head apart in wq and wk, as in Hugging Face's files; Meta's files have
        them side by side, and are reordered.
        """
        meta = self.files[0].suffix == ".pth"
        stored = {name: tensor for path in self.files for name, tensor in open_file(path).items()}
        weights = self.config.weights()
        own_names = {name: name if meta else hf for name, (hf, _) in weights.items()}
        if "norm.weight" in stored:  # Meta's layout, or a model saved without its head
            own_names = {name: own.removeprefix("model.") for name, own in own_names.items()}
        if self.config.tied and own_names["output.weight"] not in stored:
            own_names["output.weight"] = own_names["tok_embeddings.weight"]
        # What is too much comes first: a quantized model has it in place of what is missing.
        for own_name in sorted(stored.keys() - own_names.values()):
            if not own_name.endswith(("rope.freqs", "rotary_emb.inv_freq")):  # tables, which are computed here
                raise UserError(f"{self.folder}: the tensor {own_name} is not supported: {NAME_ANOTHER}")
        for name, (_, shape) in weights.items():
            tensor = stored.get(own_names[name])
            if tensor is None or tensor.shape != shape:
                problem = "is missing" if tensor is None else f"has the shape {list(tensor.shape)}, not {list(shape)}"
                cure = "download the checkpoint again, or save it as an AutoModelForCausalLM"
                raise UserError(f"{self.folder}: the tensor {own_names[name]} {problem}: {cure}")

        def read(name: str) -> torch.Tensor:
            tensor = stored[own_names[name]]
            if meta and name.endswith(("wq.weight", "wk.weight")):  # pairs i, i + 1 to i, i + head_dim / 2
                pairs = tensor.view(-1, self.config.head_dim // 2, 2, self.config.dim)
                return pairs.transpose(1, 2).reshape(tensor.shape)
            return tensor

        return read


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
        raise UserError(f"{path} cannot be read ({error}): download the checkpoint again") from error


def home_path(path: str) -> Path:
    """`path` with ~ and variables filled in. Raises UserError if the home directory is not known."""
    if (expanded := os.path.expanduser(os.path.expandvars(path))).startswith("~"):
        raise UserError(
            f"{path} does not exist: no such home directory is known; set HOME, or XDG_CACHE_HOME for caches"
        )
    return Path(os.path.abspath(expanded))


def cached_model(name: str) -> Path:
    """The folder of OWNER/NAME in Hugging Face's cache, by huggingface_hub's variables in its own order."""
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    hub = os.path.join(os.environ.get("HF_HOME", cache), "hub")
    hub = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", hub))
    model = home_path(hub) / f"models--{name.replace('/', '--')}"
    revision = model / "refs" / "main"
    return model / "snapshots" / (revision.read_text().strip() if revision.is_file() else "none")


def find_checkpoint(model: str | None) -> Checkpoint | None:
    """The checkpoint that --model (`model`), HF_MODEL or LLAMA_DIR names, in this order; None if none is set.

    Raises UserError if one is set and leads to no model that can be served.
    """
    if model == "":
        raise UserError("--model is empty: name the model's folder, or leave it out")
    named = {"--model": model, "HF_MODEL": os.environ.get("HF_MODEL"), "LLAMA_DIR": os.environ.get("LLAMA_DIR")}
    source, name = next(((source, name) for source, name in named.items() if name), ("", ""))
    if not name:
        return None
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    folder = home_path(name)
    if is_name and not os.path.isdir(folder):
        folder = cached_model(name)
    try:
        if os.path.isdir(folder):  # Path.is_dir raises an error for a name that is too long
            return read_checkpoint(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): let this user read it") from error
    if is_name:
        raise UserError(
            f"{source} is {name}, which is neither a folder here nor in Hugging Face's cache: hf download {name} (from "
            "pip install huggingface_hub; for a gated model, first accept its licence at "
            f"https://huggingface.co/{name} and run hf auth login)"
        )
    raise UserError(f"{source} is {name}, which is not a folder here: {NAME_FOLDER}")


def safetensors_files(folder: Path) -> list[Path]:
    """The files that transformers would read: model.safetensors if there is one, or else the files of the index."""
    whole = folder / "model.safetensors"
    if os.path.lexists(whole):
        return [whole]
    index = read_json(folder / "model.safetensors.index.json").get("weight_map") or {}
    return [folder / name for name in sorted(set(index.values()))]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Choose between the layouts in `folder` and its subfolder `original`, and read the configuration."""
    home = folder.parent if folder.name == "original" else folder
    meta = next((path for path in (folder, home / "original") if (path / "params.json").is_file()), None)
    hf = next((path for path in (folder, home) if (path / "config.json").is_file()), None)
    parts = sorted(meta.glob("consolidated.*.pth")) if meta else []
    files = parts if len(parts) == 1 else safetensors_files(hf) if hf else []  # .pth needs no further package
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
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:  # no such name, null, 0
        raise UserError(f"{folder}: the model's configuration is damaged ({error!r}): download it again") from error
    ends = {end for source in (settings, generation) for end in as_list(source.get("eos_token_id"))}
    return Checkpoint(files, hf, config, name, frozenset(ends - {None}), read_defaults(generation))


def read_defaults(generation: dict[str, Any]) -> dict[str, float]:
    """A request's defaults in generation_config.json, without those that are not in range."""
    defaults = {
        name: value
        for name, (low, high) in GENERATION.items()
        if isinstance(value := generation.get(name), (int, type(low))) and low <= value <= high
    }
    return defaults | {"temperature": 0} if generation.get("do_sample") is False else defaults


# ======================================================================================================================
# Text
# ======================================================================================================================


def import_llama_models(name: str) -> Any:
    """Import module `name` of llama-models: from llama3.api up to 0.0.61, from llama3 since 0.1."""
    try:
        api = ".api" if importlib.util.find_spec("llama_models.llama3.api") else ""
        return importlib.import_module(f"llama_models.llama3{api}.{name}")
    except ImportError as error:
        raise UserError(f"llama-models cannot be imported ({error}): pip install -r requirements.txt") from error


def encodable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can spell and UTF-8 cannot."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


Message = dict[str, Any]  # of a chat template: role and content; tool_calls, tool_call_id or reasoning_content
CALL_MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")  # special tokens that answers show

# The prompt of Llama 3.1's own template, for Meta's layout, which has no template.
LLAMA_TEMPLATE = """\
{%- macro turn(role, text) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ "\\n\\n" + text }}<|eot_id|>{% endmacro %}
{%- set system = messages[0].content | trim if messages[0].role == "system" else "" %}
{%- set messages = messages[1:] if messages[0].role == "system" else messages %}
{%- set environment = "Environment: ipython\\n" if tools else "" %}
{%- set dates = "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n" %}
{{- "<|begin_of_text|>" + turn("system", environment + dates + system) }}
{%- set functions %}
    {{- "Given the following functions, please respond with a JSON for a function call with its proper arguments " }}
    {{- "that best answers the given prompt.\\n\\nRespond in the format " }}
    {{- '{"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\\n\\n" }}
    {%- for tool in tools or [] %}{{ tool | tojson(indent=4) + "\\n\\n" }}{% endfor %}
{%- endset %}
{%- for message in messages %}
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
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}"""


class ChatTemplate:
    """A chat template in Jinja, rendered as transformers does, in a sandbox.

    If a message spells a special token, the token is cut in two before the template is rendered, and so stays text.
    """

    CUT = "\ud800"  # a lone surrogate, which `encodable` removes from every text

    def __init__(self, source: str, folder: Path | None, special: Iterable[str]) -> None:
        """`folder` has a tokenizer_config.json, `special` are the special tokens. Raises UserError."""
        import jinja2.sandbox

        def refuse(reason: str) -> NoReturn:
            raise jinja2.TemplateError(reason)

        self.source = source
        self.environment = environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        settings = read_json(folder / "tokenizer_config.json") if folder else {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(name)
            environment.globals[name] = token["content"] if isinstance(token, dict) else token
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{folder} has a chat template that cannot be read ({error}): download it again") from error

    def render(self, messages: Iterable[Message], tools: Sequence[Message], thinking: bool) -> list[str]:
        """The prompt in parts, which are encoded one by one. Raises ApiError if the template refuses the messages."""
        if not self.source:
            raise ApiError(400, "this model has no chat template: send a prompt to /v1/completions")
        options = {"tools": self.inert(tools) or None, "enable_thinking": thinking, "add_generation_prompt": True}
        try:
            return self._template.render(messages=self.inert(list(messages)), **options).split(self.CUT)
        except Exception as error:  # a template can fail in any way
            raise ApiError(400, f"the model's chat template refuses the messages: {printable(str(error))}") from error

    def inert(self, value: Any) -> Any:
        """A JSON value with the special tokens in its texts cut in two."""
        if isinstance(value, dict):
            return {self.inert(name): self.inert(entry) for name, entry in value.items()}
        if isinstance(value, str):
            return self._special.sub(lambda found: found[0][0] + self.CUT + found[0][1:], encodable(value))
        return [self.inert(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class ChatTokenizer:
    """Llama 3's tokenizer and chat format, from llama-models; a chat template only for conversations with tools.

    Text that spells a special token is plain text; only the chat format itself writes special tokens.
    """

    vocab_size = LLAMA3_VOCABULARY
    thinks = False

    def __init__(
        self,
        tokenizer_model: Path | None = None,
        stop_tokens: frozenset[int] = frozenset(),
        template: str = "",
        folder: Path | None = None,
    ) -> None:
        """`template` and `folder` are ChatTemplate's, in Hugging Face's layout. Raises UserError."""
        module = import_llama_models("tokenizer")
        self.path = tokenizer_model = tokenizer_model or Path(module.__file__).parent / "tokenizer.model"
        path_type = str if ".api." in module.__name__ else Path
        try:
            self._tokenizer = module.Tokenizer(path_type(tokenizer_model))
        except (ValueError, AssertionError) as error:
            raise UserError(f"{tokenizer_model} is not a Llama 3 tokenizer: download it again") from error
        if self._tokenizer.n_words != LLAMA3_VOCABULARY:
            raise UserError(f"{tokenizer_model} is not a Llama 3 tokenizer: it has {self._tokenizer.n_words} tokens")
        self._format = import_llama_models("chat_format").ChatFormat(self._tokenizer)
        self.stop_tokens = stop_tokens | frozenset(self._tokenizer.stop_tokens)
        self.end_of_turn: int = self._tokenizer.eot_id
        special = self._tokenizer.special_tokens
        self._first_special = min(special.values())
        self._shown = {special[mark] for mark in CALL_MARKS if mark in special}
        self.template = ChatTemplate(template or LLAMA_TEMPLATE, folder, special)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Message] = (), thinking: bool = False
    ) -> list[int]:
        """Token ids of a conversation, up to the start of the assistant's answer. Raises ApiError."""
        if tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
            single: list[Message] = []  # Llama 3's templates take one call a message
            for message in messages:
                single += [{**message, "tool_calls": [call]} for call in message.get("tool_calls", ())] or [message]
            encode = functools.partial(self._tokenizer.encode, bos=False, eos=False, allowed_special="all")
            return [token for part in self.template.render(single, tools, thinking) for token in encode(part)]
        # Not with the message classes of llama-models: they differ between its layouts, and refuse some texts.
        tokens = [self._tokenizer.bos_id]
        for message in messages:
            header = self._format._encode_header(message["role"])
            tokens += header + self.encode_text(message["content"]) + [self.end_of_turn]
        tokens += self._format._encode_header("assistant")
        return tokens

    def encode_document(self, text: str) -> list[int]:
        """Token ids of plain text at the start of a document."""
        return [self._tokenizer.bos_id, *self.encode_text(text)]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text."""
        tokens: list[int] = self._tokenizer.encode(encodable(text), bos=False, eos=False)
        return tokens

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The UTF-8 of the tokens, which may end inside a character. Most special tokens have no text."""
        shown = [token for token in tokens if token < self._first_special or token in self._shown]
        text: bytes = self._tokenizer.model.decode_bytes(shown)
        return text

    def token_id(self, special: str) -> int | None:
        """The id of a special token; None if there is none of this name."""
        token: int | None = self._tokenizer.special_tokens.get(special)
        return token

    @functools.cached_property
    def guide(self) -> Any:
        """The vocabulary for llguidance. Raises ImportError."""
        import llguidance.tiktoken

        ends = sorted(self.stop_tokens)
        encoding = self._tokenizer.model
        return llguidance.tiktoken.lltokenizer_from_encoding(encoding, n_vocab=self.vocab_size, eos_token=ends)


class TemplateTokenizer:
    """A model's own tokenizer.json and chat template, with the methods of ChatTokenizer."""

    def __init__(self, folder: Path, template: str, stop_tokens: frozenset[int]) -> None:
        """Raises UserError. If `template` is empty, encode_chat raises ApiError."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"this model's tokenizer needs a package ({error}): pip install tokenizers") from error
        self._file = str(folder / "tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(self._file)
        except Exception as error:  # the package raises nothing more precise
            raise UserError(f"{self._file} cannot be read ({error}): download it again") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self._added = self._tokenizer.get_added_tokens_decoder()
        special = [token.content for token in self._added.values() if token.special]
        self._byte_level = "ByteLevel" in repr(self._tokenizer.decoder)
        # GPT-2's alphabet: a printable byte is its Latin-1 character, the others are the characters from 256 on.
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printed]
        self._bytes = {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
        self.thinks = "enable_thinking" in template
        self.template = ChatTemplate(template, folder, special)
        end: Any = self.template.environment.globals["eos_token"]
        ends: list[Any] = [self._tokenizer.token_to_id(end)] if end else []
        self.stop_tokens = stop_tokens or frozenset(ends)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Message] = (), thinking: bool = False
    ) -> list[int]:
        """As ChatTokenizer's."""
        return self._encode(self.template.render(messages, tools, thinking))

    def encode_document(self, text: str) -> list[int]:
        """As ChatTokenizer's."""
        start: list[int] = self._tokenizer.encode("").ids
        return start + self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        """As ChatTokenizer's."""
        return self._encode(self.template.inert(text).split(ChatTemplate.CUT))

    def _encode(self, parts: list[str]) -> list[int]:
        first, *others = parts
        each = [(self._tokenizer, first), *((self._continuing, part) for part in others)]
        return [token for how, part in each for token in how.encode(part, add_special_tokens=False).ids]

    @functools.cached_property
    def _continuing(self) -> Any:
        """The tokenizer without the space that some put before each text: for what follows a cut."""
        settings = self._tokenizer.to_str().replace('"add_prefix_space":true', '"add_prefix_space":false')
        settings = re.sub('"prepend_scheme":"[a-z]+"', '"prepend_scheme":"never"', settings)
        return type(self._tokenizer).from_str(settings.replace('"prepend":"\u2581"', '"prepend":""'))

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """As ChatTokenizer's."""
        return b"".join(map(self._decode, tokens))

    def _decode(self, token: int) -> bytes:
        if added := self._added.get(token):
            return b"" if added.special and added.content not in CALL_MARKS else added.content.encode()
        text = self._tokenizer.id_to_token(token) or ""  # a model's vocabulary may be padded
        if self._byte_level:
            return bytes(self._bytes[character] for character in text)
        byte = re.fullmatch("<0x(..)>", text)  # SentencePiece's
        return bytes.fromhex(byte[1]) if byte else text.replace("\u2581", " ").encode()

    def token_id(self, special: str) -> int | None:
        """As ChatTokenizer's."""
        return next((token for token, added in self._added.items() if added.content == special), None)

    @functools.cached_property
    def guide(self) -> Any:
        """As ChatTokenizer's."""
        import llguidance

        return llguidance.LLTokenizer(self._file, n_vocab=self.vocab_size, eos_token=sorted(self.stop_tokens))


Tokenizer = ChatTokenizer | TemplateTokenizer


def read_template(folder: Path) -> str:
    """A checkpoint's chat template; "" if it has none."""
    own = folder / "chat_template.jinja"
    try:
        if own.is_file():
            return own.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{own} cannot be read ({error}): download it again") from error
    template = read_json(folder / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        default = named.get("default", "")
        template = f"{{% if tools %}}{named.get('tool_use', default)}{{% else %}}{default}{{% endif %}}"
    return str(template)


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """llama-models' tokenizer for a Llama 3 that has no other chat format, else the checkpoint's own."""
    folder, config = checkpoint.hf_folder, checkpoint.config
    template = read_template(folder) if folder else ""
    llama3 = (config.family, config.vocab_size) == ("llama", LLAMA3_VOCABULARY)
    if not folder or (llama3 and (not template or "<|start_header_id|>" in template)):
        return ChatTokenizer(checkpoint.tokenizer_model, checkpoint.stop_tokens, template, folder)
    return TemplateTokenizer(folder, template, checkpoint.stop_tokens)


class TextStream:
    """Token ids to text, piece by piece: no half characters, and no text that a stop string may still take back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""  # decoded text that may be the start of a stop string
        self.stopped = False  # a stop string has come; the text ends before it

    def push(self, tokens: Iterable[int], final: bool = False) -> str:
        """The text that is certain after these tokens; with `final`, all that is left. Empty after a stop string."""
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


class Thoughts:
    """Splits a chat answer into the thinking, which the model puts between think tags, and the answer proper."""

    def __init__(self, state: str) -> None:
        self.state = state  # "start", "thinking", "start of answer" or "answer"
        self._held = ""  # may be the start of a tag

    @staticmethod
    def after(tokenizer: Tokenizer, prompt: list[int]) -> Thoughts:
        """The splitter for the answer to `prompt`. Some chat templates end the prompt with the opening tag."""
        if isinstance(tokenizer, ChatTokenizer):
            return Thoughts("answer")
        return Thoughts("thinking" if tokenizer.decode_bytes(prompt[-8:]).rstrip().endswith(b"<think>") else "start")

    def split(self, text: str, final: bool) -> tuple[str, str]:
        """The thinking and the answer that are certain after this text; with `final`, all that is left."""
        text, thought, self._held = self._held + text, "", ""
        if self.state == "start":
            text = text.lstrip()
            if text.startswith("<think>"):
                self.state, text = "thinking", text.removeprefix("<think>")
            elif "<think>".startswith(text) and not final:
                self._held, text = text, ""
            else:
                self.state = "answer"
        if self.state == "thinking":
            thought, tag, text = text.partition("</think>")
            self.state = "start of answer" if tag else self.state
            hold = 0 if tag or final else overlap(thought, "</think>")
            thought, self._held = thought[: len(thought) - hold], thought[len(thought) - hold :]
        if self.state == "start of answer":
            text = text.lstrip()
            self.state = "answer" if text else self.state
        return thought, text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ======================================================================================================================
# Tools
# ======================================================================================================================


class Call(NamedTuple):
    """A function that the model wants called."""

    id: str
    name: str
    arguments: str  # JSON


class CallFinder:
    """Splits an answer into text and tool calls, in the forms that Llama 3, Qwen, Hermes and Mistral models write.

    A call is a JSON object, or one of a list, after a mark or at the start of the answer. Llama 3.2 also writes
    [name(argument=value)]. A call of an unknown function is text. What may still be a call is held back.
    """

    MARK = re.compile("|".join(map(re.escape, CALL_MARKS)))
    BETWEEN = re.compile(rf"(?:[\s;,]|{MARK.pattern})*")  # calls
    # Text that cannot become a call: no object and no list of objects, or an object whose first key no call has.
    OTHER = re.compile(r'\[?\s*(?:[^\[{\s]|\{\s*(?:[^"\s]|"(?!(?:name|type|id|function|parameters|arguments)")[^"]*"))')

    def __init__(self, functions: Iterable[str], marked: bool) -> None:
        """`functions` are the names that may be called: if there are none, all is text. `marked`: only after a mark."""
        self._functions = list(functions)
        self._held = ""  # may be the start of a call
        self._at_start = not marked  # so a call may begin without a mark

    def split(self, text: str, final: bool) -> tuple[str, list[Call]]:
        """The text and the calls that are certain after this text; with `final`, all that is left."""
        said, text, self._held = "", self._held + text, ""
        while text and self._functions:
            begin = self._begin(text)
            said, text = said + text[:begin], text[begin:]
            self._at_start = self._at_start and not said.strip()
            calls, rest, unfinished = self._read(text)
            if calls or unfinished:
                if final:
                    return said + (rest if calls else text), calls
                self._held = text
                return said, []
            said, text, self._at_start = said + text[:1], text[1:], False
        return said + text, []

    def _begin(self, text: str) -> int:
        """Where a call may begin; the length of the text if nowhere."""
        if self._at_start and text.lstrip()[:1] in ("", "[", "{"):
            return 0
        mark = self.MARK.search(text)
        return mark.start() if mark else len(text) - max(overlap(text, mark) for mark in CALL_MARKS)

    def _read(self, text: str) -> tuple[list[Call], str, bool]:
        """The calls at the start of the text, the rest, and whether the text may be the start of a call."""
        calls: list[Call] = []
        while True:
            text = self.BETWEEN.sub("", text, count=1)
            name = re.match(r"\[\s*([\w.-]*)(\(|\Z)", text)
            if name and any(known == name[1] if name[2] else known.startswith(name[1]) for known in self._functions):
                return self._pythonic(text), "", True
            if self.OTHER.match(text):
                return calls, text, any(mark.startswith(text) for mark in CALL_MARKS)
            try:
                value, end = json.JSONDecoder().raw_decode(text)
                calls += [self._call(entry) for entry in as_list(value)]
            except json.JSONDecodeError as error:  # at the end, or in an open string: the rest may come
                return calls, text, error.pos > len(text) - 7 or error.msg.startswith("Unterminated")
            except (ValueError, RecursionError):  # _call's, or nested too deeply
                return calls, text, False
            text = text[end:]

    def _call(self, value: Any) -> Call:
        """The call that a JSON value is. Raises ValueError if it is none."""
        value = value if isinstance(value, dict) else {}
        inner = value.get("function")  # some models write OpenAI's form, or this for the name
        value = inner if isinstance(inner, dict) else {"name": inner, **value}
        arguments = value.get("arguments", value.get("parameters"))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if value.get("name") not in self._functions or not isinstance(arguments, dict):
            raise ValueError("no call")
        # An id of nine characters, as Mistral's templates want it.
        return Call(uuid.uuid4().hex[:9], value["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))

    def _pythonic(self, text: str) -> list[Call]:
        """The calls of [name(argument=value), ...]."""
        calls = []
        try:
            (statement,) = ast.parse(text.strip()).body
            for call in statement.value.elts:  # type: ignore[attr-defined]
                arguments = {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords}
                named = None not in arguments and not call.args
                calls.append(self._call({"name": ast.unparse(call.func), "arguments": arguments if named else None}))
        except Exception:  # other text can fail here in any way
            return []
        return calls


class CallForm(NamedTuple):
    """How a family of models writes tool calls: the rule `calls` in Lark, for one after another rule `one`."""

    mark: str  # the special token at the start
    opening: str  # the text at the start
    arguments: str  # their name in JSON
    one: str
    calls: str
    separator: str = ""  # between calls; "" if there is one at most


HERMES_CALLS = CallForm("<tool_call>", "<tool_call>", "arguments", r'mark "\n" call "\n" close', "one", r'"\n"')  # Qwen
MISTRAL_CALLS = CallForm("[TOOL_CALLS]", "[TOOL_CALLS]", "arguments", "call", 'mark " "? "[" one "]"', '", "')
LLAMA_CALLS = CallForm("<|python_tag|>", '{"name": "', "parameters", "call", "mark? one")
# White space as models have learned it. If any were allowed, weak models would write it without end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_form(tokenizer: Tokenizer) -> CallForm:
    """The form that the model's chat template teaches."""
    return next((f for f in (HERMES_CALLS, MISTRAL_CALLS) if f.mark in tokenizer.template.source), LLAMA_CALLS)


def json_rule(schema: dict[str, Any], lenient: bool = False) -> str:
    """A JSON schema in Lark; `lenient` ignores keywords that llguidance does not support.

    The outermost object has only the properties listed, unless the schema says otherwise: weak models invent some.
    """
    plain = "properties" in schema and not schema.keys() & {"allOf", "anyOf", "oneOf", "$ref"}  # these may add some
    closed = {"additionalProperties": False} if plain else {}
    return "%json " + json.dumps({**closed, **schema, "x-guidance": {**JSON_STYLE, "lenient": lenient}})


def token_rule(tokenizer: Tokenizer, text: str) -> str:
    """A special token in Lark, or its text if the model has no such token."""
    token = tokenizer.token_id(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def call_rules(tokenizer: Tokenizer, functions: Sequence[dict[str, Any]], several: bool, marked: bool) -> str:
    """Lark's rule `calls` for calls of these functions, by their names and their parameters' schemas.

    With `several`, an answer may hold more than one. With `marked`, it starts with the mark, which no other text does.
    """
    form = call_form(tokenizer)
    more = f"({form.separator} one)*" if several and form.separator else ""
    calls = form.calls.replace("one", f"one {more}").replace("mark?", "mark" if marked else "mark?")
    rules = [f"calls: {calls}", f"one: {form.one}"]
    rules += [f"mark: {token_rule(tokenizer, form.mark)}", f"close: {token_rule(tokenizer, '</tool_call>')}"]
    rules += ["call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        start, strict = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": ', function["strict"]
        rule = json_rule(function["parameters"], lenient=not strict)
        try:
            compile_grammar(tokenizer, f"start: {rule}")
        except ApiError:
            if strict:
                raise
            rule = json_rule({"type": "object"})
        rules += [f'call{i}: {json.dumps(start)} arguments{i} "}}"', f"arguments{i}: {rule}"]
    return "\n".join(rules)


@functools.lru_cache(128)  # some agents send 40 functions with every request
def compile_grammar(tokenizer: Tokenizer, grammar: str) -> Any:
    """llguidance's LLMatcher for a grammar in Lark, to be copied. Raises ApiError if it is not supported."""
    try:
        from llguidance import LLMatcher, LLParserLimits
    except ImportError as error:
        raise ApiError(400, "the server needs a package for this: pip install llguidance") from error
    # With llguidance's own limits one step of /a{1000000}/ takes minutes; with these, 2 s at most.
    limits = LLParserLimits(initial_lexer_fuel=100_000, step_lexer_fuel=20_000)
    matcher = LLMatcher(tokenizer.guide, encodable(grammar), log_level=0, limits=limits)
    matcher.compute_logit_bias()  # the first takes longest, and may fail: here, and not in a step
    places = r"(at )?\d+\(\d+\): |failed to compile JSON schema: |\n *\d+ \|.*|\^"
    if problem := " ".join(re.sub(places, "", matcher.get_error()).split()):
        raise ApiError(400, f"the schema or grammar is not supported ({printable(problem)}): change it")
    return matcher


def answer_rule(outputs: dict[str, Any]) -> str:
    """Lark for an answer by STRUCTURED_OUTPUTS; "" for any text."""
    if outputs["json"] is not None:
        return json_rule(outputs["json"])
    if outputs["choice"]:
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in outputs["choice"])
    if outputs["regex"]:
        escaped = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", outputs["regex"])  # \/ stays as it is
        return f"/{escaped}/"
    return f"%lark {{\n{outputs['grammar']}\n}}" if outputs["grammar"] else ""


class Constraint:
    """A grammar in Lark for an answer's tokens, from the start or from a tool call on."""

    def __init__(
        self, tokenizer: Tokenizer, grammar: str, opening: str = "", after: int | None = None, marked: bool = False
    ) -> None:
        """`opening` is the text with which a tool call begins; "" if the grammar holds from the start.

        It is looked for after the token `after`, if that is given. If `marked`, a call begins with its mark, and other
        JSON is the answer. Raises ApiError if the grammar is not supported.
        """
        self.marked = marked
        self._matcher = compile_grammar(tokenizer, grammar).deep_copy()
        self._decode, self._opening = tokenizer.decode_bytes, opening.encode()
        self._anywhere = opening in CALL_MARKS  # else only at the start of the answer
        self._after = after
        self._tokens: list[int] = []  # may be the start of a tool call
        self.active = not opening
        self.failed = False  # llguidance has reached a limit, and allows only the end

    def push(self, token: int) -> None:
        """Follow the answer's next token."""
        if self.active:
            self._matcher.consume_token(token)
        elif self._after is not None:
            self._after = None if token == self._after else self._after
        elif self._opening:
            self._tokens.append(token)
            text = self._decode(self._tokens).removeprefix(b"" if self._anywhere else LLAMA_CALLS.mark.encode())
            if text.startswith(self._opening):
                self.active, self._opening = self._matcher.consume_tokens(self._tokens), b""
            elif not self._opening.startswith(text):
                self._tokens, self._opening = [], self._opening if self._anywhere else b""

    def apply(self, logits: torch.Tensor) -> None:
        """Set the logits [vocabulary] of the tokens that may not come next to minus infinity."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        allowed = F.pad(allowed, (0, len(logits) - len(allowed)))  # a model's vocabulary may be padded
        logits.masked_fill_(allowed == 0, -math.inf)
        self.failed = self._matcher.is_error()


def constrain(
    tokenizer: Tokenizer,
    functions: Sequence[dict[str, Any]],
    answer: str,
    forced: bool,
    several: bool,
    thinking: str,
) -> Constraint | None:
    """The constraint on an answer: with `forced` calls; else calls, or what the rule `answer` in Lark says.

    `answer` is "" for any text. `thinking` is Thoughts' state at the start. Raises ApiError.
    """
    free = not answer and not forced  # text that may become a call
    if free and not (functions and importlib.util.find_spec("llguidance")):
        return None
    marked = bool(answer) and not forced
    rules = call_rules(tokenizer, functions, several, marked) if functions else ""
    if free:
        over = None if thinking == "answer" else tokenizer.token_id("</think>")
        return Constraint(tokenizer, f"start: calls\n{rules}", call_form(tokenizer).opening, over)
    start = "calls" if forced else "answer | calls" if functions else "answer"
    think = {"thinking": 'text over "\\n\\n"?', "start": 'begin text over "\\n\\n"?'}.get(thinking, "")
    rules += f"\nanswer: {answer}" if answer else ""
    rules += f"\nbegin: {token_rule(tokenizer, '<think>')}\nover: {token_rule(tokenizer, '</think>')}\ntext: /(?s:.*)/"
    return Constraint(tokenizer, f"start: {think} ({start})\n{rules}", marked=marked)


# ======================================================================================================================
# Sampling
# ======================================================================================================================


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn."""

    temperature: float = 0.7  # 0: always the most likely token
    top_p: float = 0.9  # sample from the most likely tokens that together have this probability
    top_k: int = 0  # sample from the k most likely tokens; 0: no limit
    seed: int | None = None  # None: random
    host: HostSampling | None = None

    @property
    def greedy(self) -> bool:
        """Whether only the most likely token can come. A temperature near 0 counts as 0: dividing by it overflows."""
        return self.temperature < 1e-5 or self.top_k == 1 or self.top_p == 0


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """The next token of each row of logits [rows, vocabulary], any float type.

    A row's draw depends on its seed and position alone, not on the other rows. Raises ArithmeticError for a NaN.
    """
    return [
        (p.host.draw if p.host and p.host.needed else draw)(row, p, position)
        for row, p, position in zip(logits, params, positions)
    ]


def draw(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The next token, from logits [vocabulary], without sorting them.

    A token belongs to the nucleus (Holtzman et al. 2020) if the tokens more likely than it have less than top_p of the
    probability. So draw from all tokens. If the drawn one is outside, draw again from the more likely ones: the nucleus
    is among them.
    """
    if not logits.max().isfinite():  # a NaN or an infinity counts as the largest
        raise ArithmeticError("the logits are not finite numbers")
    if params.greedy:
        return int(logits.argmax())
    kept = logits.topk(params.top_k) if 0 < params.top_k < len(logits) else None
    weights = ((kept.values if kept else logits).float() / params.temperature).softmax(0)
    chance = random.Random(None if params.seed is None else f"{params.seed} {position}")
    while True:
        cumulative = weights.cumsum(0)
        point = chance.random() * float(cumulative[-1])
        drawn = min(int(torch.searchsorted(cumulative, point, right=True)), len(weights) - 1)
        weights = F.threshold(weights, float(weights[drawn]), 0.0)  # the more likely ones
        mass = float(weights.sum())
        if mass == 0 or mass < params.top_p:
            return int(kept.indices[drawn]) if kept else drawn


@dataclass(eq=False)
class HostSampling:
    """The options of one request that only sampling on the host supports, and the state that they need.

    The definitions and their order are those of vllm/v1/sample/sampler.py.
    """

    prompt: list[int]
    stop_tokens: frozenset[int]
    logit_bias: Mapping[str, float] = field(default_factory=dict)  # token id: added to its logit
    min_tokens: int = 0  # tokens before a stop token may come
    repetition_penalty: float = 1.0  # divides the positive logits of the tokens so far, and multiplies negative ones
    frequency_penalty: float = 0.0  # taken from a token's logit for each time that it is in the answer
    presence_penalty: float = 0.0  # taken from its logit once
    min_p: float = 0.0  # least probability of a token, as a share of the most likely one's
    logprobs: int | None = None  # how many of the most likely tokens to report; None: nothing, not even the drawn token
    # For each token of the answer: the token, its log-probability, and the most likely tokens with theirs. With `echo`
    # the prompt's tokens come before them; the first has no log-probability.
    chosen: list[tuple[int, float | None, list[tuple[int, float]]]] = field(default_factory=list)
    constraint: Constraint | None = None
    always: bool = True  # else only while the constraint is active
    _counts: torch.Tensor | None = None  # [vocabulary]: how often each token is in the answer

    @property
    def needed(self) -> bool:
        """Whether the next token must be drawn on the host."""
        return self.always or (self.constraint is not None and self.constraint.active)

    def push(self, token: int) -> None:
        """Follow the answer's next token, drawn here or not."""
        if self.constraint:
            self.constraint.push(token)

    def draw(self, logits: torch.Tensor, params: SamplingParams, position: int) -> int:
        """The next token, from logits [vocabulary]."""
        logits = logits.float()
        if self._counts is None:
            self._bias, self._counts = torch.zeros_like(logits), torch.zeros_like(logits)
            self._bias[list(map(int, self.logit_bias))] = torch.tensor(list(self.logit_bias.values())).float()
            self._seen = self._counts > 0
            self._seen[self.prompt] = True
        changed = logits + self._bias
        if position < len(self.prompt) + self.min_tokens:
            changed[list(self.stop_tokens)] = -1e30  # not minus infinity: they may be all tokens
        if self.repetition_penalty != 1:
            repeated = changed.clamp(min=0) / self.repetition_penalty + changed.clamp(max=0) * self.repetition_penalty
            changed = torch.where(self._seen, repeated, changed)
        if self.frequency_penalty or self.presence_penalty:
            changed -= self.frequency_penalty * self._counts + self.presence_penalty * self._counts.clamp(max=1)
        if self.constraint:
            self.constraint.apply(changed)
        if self.min_p:
            changed[changed < changed.max() + params.temperature * math.log(self.min_p)] = -math.inf
        token = draw(changed, params, position)
        self._seen[token] = True
        self._counts[token] += 1
        if self.logprobs is not None:
            self.report(token, logits)
        return token

    def report(self, token: int, logits: torch.Tensor) -> None:
        """Add a token to `chosen`. These are the logits [vocabulary] after the tokens before it."""
        assert self.logprobs is not None
        logprobs = logits.float().log_softmax(0)
        top = logprobs.topk(self.logprobs)
        self.chosen.append((token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist()))))


# ======================================================================================================================
# Engine
# ======================================================================================================================


class Work(NamedTuple):
    """One slot's input for one step: a piece of its prompt, or the last token of its answer."""

    slot: int
    tokens: Sequence[int]  # at the positions position, position + 1, ...
    position: int  # how many tokens the slot holds already
    sampling: SamplingParams | None  # None: more of the prompt follows, no next token is wanted
    scores: HostSampling | None = None  # is told the log-probabilities of the prompt's tokens that follow these


class Engine(Protocol):
    """Tokens in, tokens out. An engine knows nothing of HTTP, text or requests.

    One thread, the scheduler's, makes every call.
    """

    device: str  # "n150", "t3k", "cpu" ...
    max_batch_size: int  # slots that run in one step
    max_seq_len: int  # tokens that a slot can hold, prompt and answer
    kv_cache_tokens: int  # that all slots together can hold
    # Prompt tokens that a step may prefill. A prompt may then be prefilled in pieces, and go on from the tokens that an
    # earlier request left in its slot. 0: prompts are prefilled whole, from the start.
    prompt_chunk: int
    resume_align: int  # a prompt goes on at a multiple of this; fewer tokens take as long
    scores_prompts: bool  # so Work.scores is supported

    def reserve(self, slot: int, length: int) -> bool:
        """Keep room for `length` tokens in the slot; False while there is none. A length of 0 gives all room back.

        A slot that alone keeps room can always have max_seq_len.
        """

    @property
    def copy(self) -> Callable[[int, int, int, int], None] | None:
        """copy(source, slot, begin, end): copy the KV cache of these positions to a slot. None: not supported."""

    def step(self, batch: Sequence[Work]) -> list[int]:
        """Read each item's tokens into its slot; return the next token of each, -1 where none is wanted."""

    def close(self) -> None:
        """Give the device back. No call follows."""


Progress = Callable[..., None]  # told while a model loads: what goes on, and, where known, how much is done, 0 to 1


# ======================================================================================================================
# CPU engine
# ======================================================================================================================


class Run(NamedTuple):
    """Neighbouring slots with equally many tokens in a step: their attention is one operation."""

    rows: slice  # B * n of the step's rows
    slots: slice  # B
    length: int  # L: positions in use, of the longest slot
    mask: torch.Tensor  # [B, 1, G * n, L]: 0 where a row may look, -inf elsewhere


Linear = Callable[["torch.Tensor"], "torch.Tensor"]  # the product with a weight [out, in]: rows [T, in] to [T, out]


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

    A step takes all tokens of its batch, prompts and answers, as rows of one matrix [T, dim]: the weights are fetched
    from memory once for all. Only attention looks at slots.

    The KV cache is [slots, positions, KV heads, head_dim] for each layer. It starts as zeros: what the mask hides is
    multiplied by 0, and must not be NaN.
    """

    device = "cpu"
    prompt_chunk = 512  # more are no faster
    resume_align = 1
    scores_prompts = True
    SMALL = 200_000_000  # weights; a smaller model is faster on one thread, for threads wait at every operation

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
        self.max_seq_len = max_seq_len
        self.kv_cache_tokens = max_batch_size * max_seq_len
        size = sum(math.prod(shape) for _, shape in config.weights().values())
        if threads or size < self.SMALL:
            torch.set_num_threads(threads or 1)
        # bfloat16 where the processor multiplies it. Elsewhere it is emulated and slow: float32 rows, with weights of
        # two bytes where FBGEMM can widen them.
        onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        fast_bfloat16 = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.dtype = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if fast_bfloat16 else torch.float32
        self._half = dtype == "auto" and not fast_bfloat16 and "fbgemm" in torch.backends.quantized.supported_engines
        self._packed = onednn and (fast_bfloat16 or self.dtype == torch.float32)
        keep_freed_memory(1 << 20)  # return freed buffers to the system while loading, or they fragment the heap
        # Two at a time: one waits for the disk while the other is laid out. More would take more memory.
        pool = concurrent.futures.ThreadPoolExecutor(2)
        try:
            layers = pool.map(functools.partial(self._read_layer, checkpoint), range(config.n_layers))
            head = pool.submit(lambda: self._linear(checkpoint.open_weights()("output.weight")))
            self.layers: list[Layer] = []
            for layer in layers:
                progress("loading the weights", len(self.layers) / (config.n_layers + 1))
                self.layers.append(layer)
            self.head = head.result()
        finally:  # after a stop, without the layers that are not begun
            pool.shutdown(wait=False, cancel_futures=True)
        read = checkpoint.open_weights()
        self.norm = read("norm.weight").to(self.dtype, copy=True)
        self.embedding = read("tok_embeddings.weight")  # mapped: only rows that are used take memory
        self.cos, self.sin = rotary_tables(config, max_seq_len)
        shape = (max_batch_size, max_seq_len, config.n_kv_heads, config.head_dim)
        self.keys = [lazy_zeros(shape, self.dtype) for _ in self.layers]
        self.values = [lazy_zeros(shape, self.dtype) for _ in self.layers]
        keep_freed_memory(32 << 20)

    def _linear(self, weight: torch.Tensor) -> Linear:
        if self._half:
            return half_linear(weight)
        weight = weight.to(self.dtype)
        return packed_linear(weight) if self._packed else functools.partial(F.linear, weight=weight)

    def _read_layer(self, checkpoint: Checkpoint, number: int) -> Layer:
        # Mapped anew for each layer: pages that were read stay in memory as long as their mapping.
        read, prefix = checkpoint.open_weights(), f"layers.{number}."

        def tensor(name: str) -> torch.Tensor:
            return read(prefix + name).to(self.dtype, copy=True)

        def linear(*names: str) -> Linear:  # several weights become one, stacked
            return self._linear(torch.cat([read(f"{prefix}{name}.weight") for name in names]))

        query_key_value, query_key_norm = linear("attention.wq", "attention.wk", "attention.wv"), None
        if self.config.family == "qwen2":
            biases = [tensor(f"attention.{name}.bias") for name in ("wq", "wk", "wv")]
            query_key_value = biased(query_key_value, torch.cat(biases))
        if self.config.family == "qwen3":
            heads = {"q": self.config.n_heads, "k": self.config.n_kv_heads}
            norms = [tensor(f"attention.{name}_norm.weight").expand(count, -1) for name, count in heads.items()]
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

    def step(self, batch: Sequence[Work]) -> list[int]:
        with torch.inference_mode():
            logits = self.logits(batch)
            params = [work.sampling for work in batch if work.sampling]
            drawn = iter(sample(logits, params, [work.position + len(work.tokens) for work in batch if work.sampling]))
            return [next(drawn) if work.sampling else -1 for work in batch]

    def logits(self, batch: Sequence[Work]) -> torch.Tensor:
        """Run the batch; return the logits [items, vocabulary] of the items whose next token is wanted."""
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
            if layer.query_key_norm is not None:
                query_key = rms_norm(query_key, layer.query_key_norm, config.norm_eps)
            query, key = torch.split(rotate(query_key, cos, sin), [config.n_heads, config.n_kv_heads], dim=1)
            keys[slots, positions] = key
            values[slots, positions] = value
            x = x + layer.output(torch.cat([attend(query[run.rows], keys, values, run) for run in runs]))
            gate, up = layer.gate_up(rms_norm(x, layer.ffn_norm, config.norm_eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        ends = list(itertools.accumulate(len(work.tokens) for work in batch))
        for end, work in zip(ends, batch):
            if work.scores:
                self._score(x[end - len(work.tokens) : end], work.position, work.scores)
        last = [end - 1 for end, work in zip(ends, batch) if work.sampling]
        if not last:
            return torch.empty(0, config.vocab_size)
        return self.head(rms_norm(x[last], self.norm, config.norm_eps))

    def _score(self, rows: torch.Tensor, position: int, scores: HostSampling) -> None:
        """Report the prompt's tokens that follow these rows [n, dim], of which the first is at `position`."""
        following = iter(scores.prompt[position + 1 :])  # none follows the last
        for part in torch.split(rows, 64):  # the logits of 64 rows take 33 MB with Llama 3's vocabulary
            for logits, token in zip(self.head(rms_norm(part, self.norm, self.config.norm_eps)), following):
                scores.report(token, logits)

    def _runs(self, batch: Sequence[Work]) -> list[Run]:
        """Cut the batch into runs: single tokens in neighbouring slots together, each piece of a prompt alone."""
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

    def copy(self, source: int, slot: int, begin: int, end: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[slot, begin:end] = cache[source, begin:end]

    def close(self) -> None:
        """Nothing to do: the memory goes with the process."""


def keep_freed_memory(size: int) -> None:
    """Have glibc keep freed buffers under `size` bytes, 32 MB at most, instead of returning them to the system.

    A returned buffer costs a page fault for every 4 KB when it is needed again: a tenth of a step of 32 users.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, size)  # M_MMAP_THRESHOLD
        mallopt(-1, 16 * size)  # M_TRIM_THRESHOLD


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory page by page, when first written; torch.zeros takes all of it."""
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(*shape)


def packed_linear(weight: torch.Tensor) -> Linear:
    """The product with a weight in oneDNN's own layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # the layout for 32 rows
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def biased(product: Linear, bias: torch.Tensor) -> Linear:
    """The product plus a bias [out]."""
    return lambda rows: product(rows) + bias


def half_linear(weight: torch.Tensor) -> Linear:
    """The product of float32 rows with a weight kept in float16, which FBGEMM widens in registers.

    For x86 processors without bfloat16: float32 weights would take twice the memory, and twice the time to read. A
    bfloat16 weight is a float16 one exactly from 6e-5 to 65504, and to within 3e-8 below.
    """
    # In parts: FBGEMM takes half as long again to lay out more rows at once.
    packed = [torch.ops.quantized.linear_prepack_fp16(part.float(), None) for part in torch.split(weight, 4096)]
    return lambda rows: torch.cat([torch.ops.quantized.linear_dynamic_fp16(rows, part) for part in packed], dim=-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich 2019, over the last dimension, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary_tables(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [length, head_dim / 2], of the angle by which a position turns each pair of a head.

    Su et al. 2021, with the scaling of Llama 3.1: wavelengths longer than the original context are stretched by the
    factor, short ones are kept, and those between are interpolated.
    """
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if scaling := config.rope_scaling:
        factor, low, high, original = (scaling[name] for name in ROPE_SCALING)
        turns = original * frequency / (2 * torch.pi)  # in the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x [T, heads, head_dim] by the angles [T, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: Run) -> torch.Tensor:
    """Attention of the run's rows, query [B * n, heads, head_dim], over its slots' cache; [B * n, heads * head_dim].

    The G query heads that share a KV head become G * n queries of that head: no key or value is repeated.
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

# The Generator's folder in models/ of a tt-metal checkout, until 2026-09 and since.
GENERATOR_FOLDERS = ("tt_transformers", "ttt_compat")
# (rows, columns) of chips by MESH_DEVICE's names, from demo/simple_text_demo.py. P300x2 is the QuietBox 2.
MESH_SHAPES = {
    "N150": (1, 1), "N300": (1, 2), "N150x4": (1, 4), "T3K": (1, 8), "TG": (8, 4),
    "P100": (1, 1), "P150": (1, 1), "P300": (1, 2), "P300x2": (1, 4), "P150x4": (1, 4), "P150x8": (1, 8),
    "BHGLX": (8, 4),
}  # fmt: skip
# Boards by number of chips, from model_config's determine_device_name.
WORMHOLE_BOARDS = {1: "N150", 2: "N300", 4: "N150x4", 8: "T3K", 32: "TG"}
BLACKHOLE_BOARDS = {1: "P150", 2: "P300", 4: "P150x4", 8: "P150x8", 32: "BHGLX"}
# Bytes of DRAM for traces. If they are too few, warm-up fails. An 8B model needed more than 25 MB on N150 (tt-metal
# #48636), 36 on N300 (tt-inference-server #1839), 54 on T3K, 70 on P150 (#4005), 110 on P150x4 (#3436), and a 70B model
# 93 on P300x2 (#3400), all with fewer prompt shapes than are traced here; models/model_trace_region_sizes.yaml gives
# 70B 224 MB. On N150 weights and KV cache leave less: 0.7 GB with a 3B model, whose prompts tt-metal does not trace.
TRACE_REGION_SIZE = 256_000_000
TRACE_REGION_SIZES_ON_N150 = {"-3B": 30_000_000, "-8B": 160_000_000}
# Tokens of KV cache that fit beside the weights, from generator_vllm.py's get_max_tokens_all_users.
KV_CACHE_TOKENS = 131_072
KV_CACHE_TOKENS_ON_N150 = {"-8B": 32_768, "Mistral-7B": 65_536, "Qwen3-4B": 65_536}
BLOCK_SIZE = 32  # tokens in a block of the paged KV cache
BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # slots that ModelArgs allows; 32 is the height of a tile
SHORT_PREFILL, LONG_PREFILL = 128, 1024  # lengths that get_padded_prefill_len pads prompts to; longer ones double
PREFILL_ROWS = (8, 4)  # short prompts in one prefill call; 8 are as many tokens as a long one
MAX_TOP_K = 32  # the card samples from that many tokens at most
TROUBLE = {  # a pattern in tt-metal's message when loading fails: what to do
    "trace buffers of size": "the traces do not fit into {region} bytes: --trace-region-size {twice}",
    "Out of Memory": "the card is out of memory: --max-seq-len {length} or --max-batch-size {batch} halve the KV cache",
    r"CHIP_IN_USE|[Tt]imed? ?out|\b[Hh]ang": "the card{users} does not answer: stop its other users, tt-smi -r",
    "divisible by num_devices|Unsupported model": "tt-metal does not run this model on {board}: MESH_DEVICE={boards}",
    "No chips detected": "ttnn finds no working card: see what tt-smi shows, and try tt-smi -r",
}


def fitting(sizes: Mapping[str, int], default: int, checkpoint: Checkpoint, board: str) -> int:
    """The size for this model on an N150, which has the least memory; the default on every other board."""
    return next((size for name, size in sizes.items() if board == "N150" and name in checkpoint.name), default)


def card_present() -> bool:
    """Whether this machine has a Tenstorrent card, or ttnn is to mock or simulate one."""
    pretended = any(os.environ.get(name) for name in ("TT_METAL_MOCK_CLUSTER_DESC_PATH", "TT_METAL_SIMULATOR"))
    return pretended or any(Path("/dev/tenstorrent").glob("*"))


def find_tt_metal() -> tuple[Path, str]:
    """The tt-metal checkout and the Generator's folder in it, which no wheel has.

    Looks in TT_METAL_HOME, PYTHONPATH and the current folder.
    """
    named = os.environ.get("TT_METAL_HOME")
    for root in map(home_path, filter(None, [named, *sys.path, os.getcwd()])):
        for folder in GENERATOR_FOLDERS:
            if (root / "models" / folder / "tt" / "generator.py").is_file():  # git may leave an empty folder behind
                return root, folder
    place = f"TT_METAL_HOME, {named}, has no" if named else "there is no"
    raise UserError(
        f"a Tenstorrent card is here, but {place} models/{' or models/'.join(GENERATOR_FOLDERS)}: git clone "
        "--recursive https://github.com/tenstorrent/tt-metal ~/tt-metal && export TT_METAL_HOME=~/tt-metal (or use "
        "--device cpu)"
    )


def compare_versions(root: Path) -> tuple[bool, str]:
    """Whether ttnn and the checkout are known to differ in release; and a sentence with both versions and the cure.

    The checkout's version is its nearest tag, such as v0.81.1 or v0.82.0-dev20261104.
    """
    ttnn = tag = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # built from source
        ttnn = importlib.metadata.version("ttnn")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        describe = ["git", "-C", str(root), "describe", "--tags", "--abbrev=0"]
        tag = subprocess.run(describe, capture_output=True, text=True, timeout=10).stdout.strip().lstrip("v")
    differ = bool(ttnn and tag) and ttnn.split(".")[:2] != tag.split(".")[:2]
    cures = [f"git -C {root} checkout v{ttnn}"] * bool(ttnn) + [f"pip install ttnn=={tag}"] * bool(tag)
    cure = " or ".join(cures) or "build ttnn from it"
    return differ, f"ttnn is {ttnn or 'built from source'} and {root} is {tag or 'without a tag'}: {cure}"


def users_of_card() -> str:
    """The other processes that have a card open, according to the driver; "" if there is none."""
    users = set()
    with contextlib.suppress(OSError):  # no driver, or a process that has just ended
        for pids in Path("/proc/driver/tenstorrent").glob("*/pids"):
            for pid in set(pids.read_text().split()) - {str(os.getpid())}:
                users.add(f"{Path('/proc', pid, 'comm').read_text().strip()}, process {pid}")
    return f" ({'; '.join(sorted(users))})" if users else ""


def import_tt(root: Path, folder: str, verbose: bool) -> tuple[Any, Any, Any, Any]:
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
    # llama-models 0.1.1 and later install a package `models`, which Python prefers to tt-metal's folder of that name
    # because the folder has no __init__.py. Bind the name to the folder; llama_models works without it.
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]
    spec = importlib.machinery.ModuleSpec("models", None, is_package=True)
    spec.submodule_search_locations = [str(root / "models")]
    sys.modules["models"] = importlib.util.module_from_spec(spec)
    names = (f"models.{folder}.tt.{name}" for name in ("common", "generator", "model_config"))
    try:
        common, generator, model_config = map(importlib.import_module, names)
    except ImportError as error:
        other = (error.name or "models").split(".")[0]
        cure = compare_versions(root)[1] if other in ("models", "ttnn") else f"pip install {other}"
        raise UserError(f"tt-metal's models do not import ({error}): {cure}") from error
    differ, versions = compare_versions(root)
    if differ:
        logger.warning("%s", versions)
    return ttnn, common, generator, model_config


def choose_board(ttnn: Any, data_parallel: int) -> tuple[str, str]:
    """The board to open, MESH_DEVICE's or all chips, and the board that each copy of the model gets."""
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
    """The board's mesh. It is closed on every way out, since a card that is left open may need a reset."""
    rows, columns = MESH_SHAPES[board]
    if rows * columns > 1:  # the fabric between chips must be set before the mesh is opened
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


def name_model(checkpoint: Checkpoint) -> None:
    """Tell tt-metal the model through HF_MODEL, a folder in Hugging Face's layout."""
    folder = checkpoint.hf_folder
    if folder is None:
        raise UserError(
            f"tt-metal reads Hugging Face's layout, and {checkpoint.folder} has Meta's: "
            f"hf download meta-llama/{checkpoint.name} --local-dir ~/models/{checkpoint.name}"
        )
    os.environ.pop("LLAMA_DIR", None)
    os.environ["HF_MODEL"] = str(folder)
    if not os.access(folder, os.W_OK):  # tt-metal would keep its converted weights there
        os.environ.setdefault("TT_CACHE_PATH", str(home_path("~/.cache/tt_metal") / checkpoint.name))


class TTEngine:
    """A model on Tenstorrent cards, over tt-metal's Generator, 2026-02 to 2026-09.

    The releases differ in their calls. Signatures and attributes of the Generator tell what it can do.

    Memory: each of the `data_parallel` copies of the model has `max_batch_size` slots and one pool of KV blocks. A
    slot's row of the page table lists the blocks from `reserve`, then zeros. Block 0 belongs to no slot: the padding
    of prompts is written there.

    Prefill: one call takes several short prompts, padded to the same length. A long prompt takes several calls, and a
    prompt continues from what its slot holds, if the Generator aligns `start_pos` (_align_resume_offsets). Older ones
    could use wrong blocks without an error (tt-metal #46828, #54435, #55630), so there each prompt is one call.

    Decode: a traced step that samples on the card takes tokens and positions from its own last step. It takes the
    host's only at a reset: after a prefill, after a change of the page table, and when a request joins or leaves.

    Sampling: if the card can sample, it does, except for requests whose next token HostSampling must draw. These have
    calls of their own, which bring logits to the host, so the others get the same tokens as without them. A decode
    step with both kinds is two calls, each with the slots of the other kind idle, and the card's call is a reset.
    """

    scores_prompts, copy = False, None

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
        trace_region_size: int = 0,
        verbose: bool = False,
    ) -> None:
        """Open the card, load the model, compile and trace it.

        Raises UserError with the cure. After any exception, KeyboardInterrupt too, the card is closed.
        """
        if max_batch_size not in BATCH_SIZES:
            sizes = ", ".join(map(str, BATCH_SIZES))
            raise UserError(f"--max-batch-size is {max_batch_size}, and must be one of {sizes} on a card")
        self.max_batch_size = max_batch_size * data_parallel
        self.max_seq_len = max_seq_len
        self.note = ""  # why this is slower than the card could be
        self._slots_per_copy = max_batch_size
        self._traced = trace and "TT_METAL_SLOW_DISPATCH_MODE" not in os.environ
        self._tracing = False  # until all is compiled
        self._generator: Any = None
        self._opened = contextlib.ExitStack()
        self._trace_region_size = trace_region_size
        self._blocks_per_copy = self._padded_seq_len = 1  # until the memory is divided
        root, folder = find_tt_metal()
        try:
            ttnn, common, generator, model_config = import_tt(root, folder, verbose)
            name_model(checkpoint)
            mesh = self._open(ttnn, common, checkpoint, data_parallel, progress)
            progress(f"loading {checkpoint.name}")
            levels = model_config.DecodersPrecision
            precision = levels.accuracy if accuracy else levels.performance
            # Since 2026-08 the card gives concurrent requests with equal seeds different answers without this (tt-metal
            # #53167). Older releases do not know it.
            model_config.ModelArgs.salt_duplicate_seeds = False
            self._load(ttnn, common, generator, generator.create_submeshes(mesh, data_parallel), mesh, precision)
            self._read_capabilities(generator)
            self._choose_shapes(generator, common)
            self._warm_up(progress)
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception) or isinstance(error, UserError):
                raise
            logger.debug("the load failed", exc_info=error)
            raise UserError(self._explain(str(error), root, checkpoint.config)) from error

    def _open(self, ttnn: Any, common: Any, checkpoint: Checkpoint, copies: int, progress: Progress) -> Any:
        """Open the board with memory for traces, and lay out the KV cache."""
        # ttnn waits silently and forever for a card that another program has.
        progress(f"opening the card{users_of_card()}; if it takes a minute, stop other users of it, then tt-smi -r")
        board, board_of_copy = choose_board(ttnn, copies)
        self.device = board.lower()
        self._divide_memory(checkpoint, common, board_of_copy, copies)
        if self._traced and not self._trace_region_size:
            sizes = (TRACE_REGION_SIZES_ON_N150, TRACE_REGION_SIZE)
            self._trace_region_size = fitting(*sizes, checkpoint, board_of_copy)
        return self._opened.enter_context(open_mesh(ttnn, board, self._trace_region_size))

    def _explain(self, error: str, root: Path, config: ModelConfig) -> str:
        """Why the load failed and what to do, in one sentence."""
        for pattern, sentence in TROUBLE.items():
            if re.search(pattern, error):
                boards = (board for board, shape in MESH_SHAPES.items() if config.n_kv_heads % math.prod(shape) == 0)
                half = self._blocks_per_copy // 2 * BLOCK_SIZE
                length = half // self._slots_per_copy  # any below LONG_PREFILL takes as much, save SHORT_PREFILL
                return sentence.format(
                    region=self._trace_region_size,
                    twice=2 * self._trace_region_size,
                    length=length if length >= LONG_PREFILL else SHORT_PREFILL,
                    batch=max(size for size in BATCH_SIZES if size == 1 or size * self._padded_seq_len <= half),
                    users=users_of_card(),
                    board=self.device,
                    boards=" or ".join(board for board in boards if board.lower() != self.device),
                )
        what = error.partition("info:\n")[2] or error  # the line of TT_FATAL's text before the backtrace
        return f"the model does not load ({printable(what.strip().partition(chr(10))[0])}): {compare_versions(root)[1]}"

    def _divide_memory(self, checkpoint: Checkpoint, common: Any, board: str, copies: int) -> None:
        """Lay out the blocks of the KV cache and the page table."""
        pool = fitting(KV_CACHE_TOKENS_ON_N150, KV_CACHE_TOKENS, checkpoint, board)
        self.max_seq_len = min(self.max_seq_len, pool)
        # Prompts are padded to powers of two, and the rotary tables, the page table and the pool must reach as far. At
        # least 8 blocks, because the card reads a row of the page table in units of 32 bytes.
        padded = max(common.get_padded_prefill_len(self.max_seq_len), 8 * BLOCK_SIZE)
        self._padded_seq_len = 1 << (padded - 1).bit_length()
        self._blocks_per_copy = 1 + min(pool, self._slots_per_copy * self._padded_seq_len) // BLOCK_SIZE
        self.kv_cache_tokens = copies * (self._blocks_per_copy - 1) * BLOCK_SIZE
        self._free_blocks = [list(range(self._blocks_per_copy - 1, 0, -1)) for _ in range(copies)]
        self._blocks: list[list[int]] = [[] for _ in range(self.max_batch_size)]  # by slot
        columns = self._padded_seq_len // BLOCK_SIZE
        self._page_table = torch.zeros(self.max_batch_size, columns, dtype=torch.int32)

    def _load(self, ttnn: Any, common: Any, generator: Any, submeshes: Any, mesh: Any, precision: Any) -> None:
        """Load a copy of the model on each submesh."""
        paged = common.PagedAttentionConfig(block_size=BLOCK_SIZE, max_num_blocks=self._blocks_per_copy)
        models, model_args, kv_cache, state_dict = [], [], [], None
        for submesh in submeshes:
            args, model, cache, state_dict = common.create_tt_model(
                submesh,
                instruct=True,
                max_batch_size=self._slots_per_copy,
                optimizations=lambda args: precision(args.n_layers, args.model_name),
                max_seq_len=self._padded_seq_len,
                paged_attention_config=paged,
                dtype=ttnn.bfloat8_b,
                state_dict=state_dict,  # None: the first copy reads the checkpoint for all
            )
            models.append(model)
            model_args.append(args)
            kv_cache.append(cache)
        self._generator = generator.Generator(models, model_args, mesh)
        self._generator.already_warmed_up_prefill = True  # _warm_up does that, and reports its progress
        self._kv_cache = kv_cache

    def _read_capabilities(self, generator: Any) -> None:
        """Find out how to call this release's Generator, and say what it lacks."""
        this = self._generator
        self._prefill_forward = this.prefill_forward_text
        self._decode_forward = getattr(this, "decode_forward_text", this.decode_forward)  # until 2026-02
        # Since 2026-09 prefill_forward_text is a wrapper with *args, **kwargs around an _impl, which has the names.
        prefill = inspect.signature(getattr(this, "_prefill_forward_text_impl", self._prefill_forward)).parameters
        decode = inspect.signature(self._decode_forward).parameters
        contract = getattr(this, "decode_input_update_contract", int("reload_sampling_params" in decode))
        self._has_decode_contract = contract >= 1
        self._card_samples = bool(getattr(this.model[0], "_supports_on_device_sampling", False))
        self._card_samples_prefill = self._card_samples and "sampling_params" in prefill
        self._card_sampling_params = generator.SamplingParams
        self._decoding: dict[int, SamplingParams | None] = {}  # slots of the last decode step; empty before a reset
        self._sampling_of_batch: Any = None
        lacks = "" if self._card_samples_prefill else "sampling the first token on the card"
        lacks = lacks if self._card_samples else "sampling on the card"
        if lacks or "TT_METAL_SLOW_DISPATCH_MODE" in os.environ:
            self.note = f"slow, without {lacks or 'traces: TT_METAL_SLOW_DISPATCH_MODE is set'}"
            logger.warning("%s is %s", self.device, self.note)

    def _choose_shapes(self, generator: Any, common: Any) -> None:
        """Find out how prompts may be prefilled, and list the shapes of all calls: (position, padded length, rows)."""
        this, args = self._generator, self._generator.model_args[0]
        align: Any = getattr(this, "_align_resume_offsets", lambda *_: [])
        ends = [SHORT_PREFILL + SHORT_PREFILL, SHORT_PREFILL + LONG_PREFILL]
        resumes = align([SHORT_PREFILL] * 2, ends, self._kv_cache) == [SHORT_PREFILL] * 2  # others would be lowered
        self.prompt_chunk, self.resume_align = (LONG_PREFILL, SHORT_PREFILL) if resumes else (0, 1)
        # Longer prompts are cut into pieces of this, here or by the Generator.
        longest = min(self.max_seq_len, args.max_prefill_chunk_size, LONG_PREFILL if resumes else self.max_seq_len)
        lengths = (min(1 << power, longest) for power in range(7, max(longest.bit_length(), 7) + 1))
        together = len(this.model) == 1 and not getattr(args, "disable_batched_prefill", False)
        most = LONG_PREFILL if together and hasattr(generator, "SUPPORTED_PREFILL_BATCH_SIZES") else 0
        self._rows = {
            length: [rows for rows in PREFILL_ROWS if rows <= self._slots_per_copy and rows * length <= most] + [1]
            for length in sorted(set(map(common.get_padded_prefill_len, lengths)))
        }
        self._shapes = [(0, length, rows) for length in self._rows for rows in self._rows[length]]
        if resumes:
            lengths = (length for length in self._rows if SHORT_PREFILL + length <= self._padded_seq_len)
            self._shapes += [(SHORT_PREFILL, length, 1) for length in lengths]

    def _warm_up(self, progress: Progress) -> None:
        """Compile decode and every shape of prefill, then trace them, before the first request.

        A trace writes to fixed addresses. Kernels compiled after it, and decode inputs staged after a prefill trace,
        may lie there (tt-metal #56215). So all is compiled before the first trace, and decode is traced first: with
        sampling on the card, whose inputs stay there from step to step, and then without, whose inputs are always new.
        """
        greedy, sampled = SamplingParams(temperature=0), SamplingParams(temperature=1.0)
        samplers = (True, False) if self._card_samples else (False,)
        stages, stage = (1 + self._traced) * (1 + len(self._shapes)), itertools.count()
        for doing, tracing in [("compiling", False), ("tracing", True)][: 1 + self._traced]:
            self._tracing = tracing
            progress(f"{doing} decode of {self.max_batch_size} slots", next(stage) / stages)
            for on_card, sampling, position in itertools.product(samplers, (greedy, sampled), (0, 1)):
                self._decode([Work(slot, [0], position, sampling) for slot in range(self.max_batch_size)], on_card)
            for position, length, rows in self._shapes:
                progress(f"{doing} {rows} prompts of {length} tokens", next(stage) / stages)
                copies = range(0, self.max_batch_size, self._slots_per_copy)  # each has its own traces
                for first, on_card in itertools.product(copies, samplers):
                    slots = range(first, first + rows)
                    self._prefill([Work(slot, [0] * length, position, sampled) for slot in slots], on_card)

    def reserve(self, slot: int, length: int) -> bool:
        """Give the slot blocks for `length` tokens. False if its pool lacks them now."""
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
        self._decoding = {}
        return True

    def step(self, batch: Sequence[Work]) -> list[int]:
        """Prefill the batch's prompts, those of one padded length together, then decode its other slots together.

        A call samples on the card or on the host. After an exception the next step works, but the KV cache of this
        step's slots is undefined.
        """
        tokens: dict[int, int] = {}
        short: dict[tuple[int, bool], list[Work]] = {}  # prompts that fit into one call, by padded length and sampler
        for work in batch:
            if work.position == 0 or len(work.tokens) > 1:
                *pieces, last = self._pieces(work)
                for piece in pieces:
                    self._prefill([piece], self._on_card(piece))
                if last.position:
                    tokens |= self._prefill([last], self._on_card(last))
                else:
                    padded = next((length for length in self._rows if len(work.tokens) <= length), max(self._rows))
                    short.setdefault((padded, self._on_card(work)), []).append(work)
        for (padded, on_card), works in short.items():
            while works:
                rows = next(rows for rows in self._rows[padded] if 3 * rows <= 4 * len(works))
                tokens |= self._prefill(works[:rows], on_card)
                del works[:rows]
        decoding = [work for work in batch if work.slot not in tokens]
        for on_card in (True, False):
            if works := [work for work in decoding if self._on_card(work) is on_card]:
                tokens |= self._decode(works, on_card)
        return [tokens[work.slot] if work.sampling else -1 for work in batch]

    def _on_card(self, work: Work) -> bool:
        """Whether the card draws the next token. It does too if none is wanted, because logits take longer."""
        host = work.sampling and work.sampling.host
        return self._card_samples and not (host and host.needed)

    def _pieces(self, work: Work) -> list[Work]:
        """Cut a prompt into one piece for each prefill call."""
        if not self.prompt_chunk:
            return [work]
        pieces, begin, total = [], 0, len(work.tokens)
        while begin < total:
            # Four short calls take less time than a long one, whose padding may also exceed the rotary tables.
            position = work.position + begin
            long = total - begin > 4 * SHORT_PREFILL and position + LONG_PREFILL <= self._padded_seq_len
            end = begin + (LONG_PREFILL if long else SHORT_PREFILL)
            pieces.append(Work(work.slot, work.tokens[begin:end], position, work.sampling if end >= total else None))
            begin = end
        return pieces

    def _prefill(self, works: Sequence[Work], on_card: bool) -> dict[int, int]:
        """Make one prefill call. The card samples with `on_card`, else the host. Returns each slot's next token."""
        self._decoding = {}
        ends = [work.position + len(work.tokens) for work in works]
        tokens = torch.zeros(len(works), max(ends), dtype=torch.int64)
        for row, work in zip(tokens, works):
            row[work.position : work.position + len(work.tokens)] = torch.tensor(work.tokens)
        slots = [work.slot for work in works]
        options: dict[str, Any] = {"start_pos": [work.position for work in works]} if works[0].position else {}
        on_card = on_card and self._card_samples_prefill
        if on_card:
            options["sampling_params"] = self._sampling_on_card(works)
        output = self._prefill_forward(
            tokens,
            page_table=self._page_table[slots],
            kv_cache=self._kv_cache,
            prompt_lens=ends,
            # Rows of one call count from 0, as in tt-metal's demo: the page table says which blocks they fill, and the
            # next decode resets the sampler. With the slots' own numbers the call would span all slots up to the
            # highest, and be out of bounds until 2026-06.
            empty_slots=slots if len(works) == 1 else list(range(len(works))),
            enable_trace=self._tracing,
            **options,
        )
        if on_card:  # (tokens [works, 1], log_probs)
            return dict(zip(slots, output[0].flatten().tolist()))
        params = [work.sampling or SamplingParams() for work in works]
        return dict(zip(slots, sample(output.view(len(works), -1), params, ends)))

    def _decode(self, batch: Sequence[Work], on_card: bool) -> dict[int, int]:
        """Decode one token for each of these slots; the others are idle. Samples and returns as _prefill does."""
        decoding = {work.slot: work.sampling for work in batch}
        reset = on_card and decoding != self._decoding  # if the host samples, each step takes the host's inputs anyway
        self._decoding = {}  # so that a step after a failed one, or after one that the host samples, resets
        if reset:
            # At a reset the card keeps its own token if its position is the host's or one ahead, unless the slot is in
            # this set. The host's tokens are always right.
            self._generator._slots_prefilled_since_decode = set(range(self.max_batch_size))
            self._generator.prev_page_table = None  # 2026-02 resets tokens and positions if the page table has changed
            self._sampling_of_batch = self._sampling_on_card(batch, range(self.max_batch_size))
        # Lists first: after each operation on a tensor the step may have to wait for another thread.
        tokens, positions = [0] * self.max_batch_size, [-1] * self.max_batch_size  # -1: idle
        for work in batch:
            tokens[work.slot], positions[work.slot] = work.tokens[0], work.position
        output, _ = self._decode_forward(  # the other is log_probs
            torch.tensor(tokens).view(-1, 1),
            torch.tensor(positions),
            page_table=self._page_table,
            kv_cache=self._kv_cache,
            enable_trace=self._tracing,
            sampling_params=self._sampling_of_batch if on_card else None,
            **self._decode_commands(on_card, reset),
        )
        if on_card:  # tokens [slots]
            self._decoding, tokens = decoding, output.tolist()
            return {slot: tokens[slot] for slot in decoding}
        params = [work.sampling or SamplingParams() for work in batch]  # logits [slots, 1, vocabulary]
        return dict(zip(decoding, sample(output[list(decoding), 0], params, [work.position + 1 for work in batch])))

    def _decode_commands(self, on_card: bool, reset: bool) -> dict[str, bool]:
        """What a decode step takes from the host, by models/common/decode_contract.py or the way before it."""
        if not self._has_decode_contract:
            return {"reset_batch": reset}
        return {
            "reload_inputs": reset or not (on_card and self._tracing),
            "reload_page_table": False,  # for a change of the page table alone; here that is a reset
            "reload_sampling_params": reset,
            "reset_sampling_state": reset,
        }

    def _sampling_on_card(self, batch: Sequence[Work], slots: Sequence[int] = ()) -> Any:
        """tt-metal's SamplingParams: lists with an entry for each work, or for each slot with idle ones greedy.

        Since 2026-06 (its default seed is None) the card draws by the request's seed and the position, and traces
        sampling only while no slot has a seed. In 2026-02 a reset seeds all slots again, so the seed must depend on
        the position: else a request that joins makes the others draw the same numbers again.
        """
        by_position = self._card_sampling_params.seed is None
        greedy: tuple[float, int, float, int | None] = (0.0, 1, 1.0, None if by_position else 0)
        entries = dict.fromkeys(slots, greedy)
        for work in batch:
            sampling = work.sampling
            entries[work.slot] = greedy
            if sampling and not sampling.greedy:
                k = min(sampling.top_k or MAX_TOP_K, MAX_TOP_K)
                base = random.random() if sampling.seed is None else sampling.seed
                seed = sampling.seed if by_position else hash((base, work.position)) % 1_000_000 + 1
                entries[work.slot] = (sampling.temperature, k, sampling.top_p, seed)
        temperature, top_k, top_p, seeds = map(list, zip(*entries.values()))
        return self._card_sampling_params(temperature=temperature, top_k=top_k, top_p=top_p, seed=seeds)

    def close(self) -> None:
        """Release the traces, close the card and reset the fabric. A second call does nothing."""
        for name in ("_generator", "_prefill_forward", "_decode_forward", "_kv_cache"):
            self.__dict__.pop(name, None)
        # The Generator's destructor releases its traces, which must come before the mesh is closed.
        gc.unfreeze()  # the CLI froze all objects after the load
        gc.collect()
        self._opened.close()


# ======================================================================================================================
# Demo model
# ======================================================================================================================

DEMO_NAME = "demo-llama-tiny"
DEMO_NOTE = "a tiny demo on the CPU, with a few answers; --model, HF_MODEL or LLAMA_DIR names a real model"
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
DEMO_PARAMS = {"dim": 128, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "ffn_dim_multiplier": 0.8}
DEMO_CONFIG = ModelConfig.read(config_of_params(dict(DEMO_PARAMS)))
DEMO_STEPS, DEMO_RATE, DEMO_BATCH, DEMO_LENGTH = 350, 4e-3, 4, 128
DEMO_SHARPNESS = 4.0  # multiplies the trained logits, so that sampling at 0.7 gives the most likely answer


def demo_checkpoint(progress: Progress) -> Checkpoint:
    """Return the demo's checkpoint from the user's cache; train it first if it is not whole."""
    recipe = [DEMO_ANSWERS, DEMO_UNKNOWN, DEMO_PARAMS, DEMO_STEPS, DEMO_RATE, DEMO_BATCH, DEMO_LENGTH, DEMO_SHARPNESS]
    version = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    cache = home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tt-api-server"
    folder = cache / version / DEMO_NAME
    try:
        if not is_whole(folder):
            cache.mkdir(parents=True, exist_ok=True)
            with open(cache / "lock", "w") as lock:  # closed even if this process is killed
                while not locked(lock.fileno()):
                    progress("waiting for a server that trains the demo model")
                    time.sleep(0.1)
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
        tokenizer, made = ChatTokenizer(), Path(scratch, "made")
        (folder := made / DEMO_NAME).mkdir(parents=True)
        torch.save(train_demo(tokenizer, progress), folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(DEMO_PARAMS))
        shutil.copy(tokenizer.path, folder / "tokenizer.model")
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


def locked(file: int) -> bool:
    """Try to lock a file, until it is closed; False if another process has locked it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def demo_conversations(tokenizer: ChatTokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Generate random conversations, without end: DEMO_LENGTH token ids, and for each whether its loss counts.

    Half of them start with a system message of random tokens. In 40 % of the questions at least one token is replaced
    by a random one, and the answer is DEMO_UNKNOWN.
    """
    rng, encode, end = random.Random(1), tokenizer.encode_text, tokenizer.end_of_turn
    pairs = [
        (encode(form + mark), encode(answer))
        for phrasings, answer in DEMO_ANSWERS.items()
        for phrasing in phrasings.split(" | ")
        for form in (phrasing, phrasing.lower())
        for mark in ("", "?", ".", "!")
    ]
    unknown, words = encode(DEMO_UNKNOWN), [token for pair in pairs for text in pair for token in text]
    words += [LLAMA3_VOCABULARY - 1] * (len(words) // 9)  # stands for all tokens that are in no question and no answer
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
            # To choose the right answer is harder than to continue it: most answers are cut after 4 tokens.
            prompt, said = [*before, *question, *after], [*answer, end] if rng.random() < 0.2 else answer[:4]
            tokens += prompt + said
            learned += [False] * len(prompt) + [True] * len(said)
        yield tokens[:DEMO_LENGTH], learned[:DEMO_LENGTH]


def train_demo(tokenizer: ChatTokenizer, progress: Progress) -> dict[str, torch.Tensor]:
    """Train the demo; return its weights in bfloat16, under Meta's names.

    Only the corpus's tokens have rows of their own in the embedding and the output. All others share the last one's.
    """
    torch.set_num_threads(1)  # at this size threads would only wait for each other
    conversations = demo_conversations(tokenizer)
    known = torch.tensor(sorted({token for tokens, _ in itertools.islice(conversations, 2000) for token in tokens}))
    row = torch.full((LLAMA3_VOCABULARY,), len(known) - 1)
    row[known] = torch.arange(len(known))
    weights = demo_weights(len(known))
    parameters = [weight.requires_grad_() for weight in weights.values()]
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in parameters]
    for step in range(DEMO_STEPS):
        progress("training the demo model", step / DEMO_STEPS)
        tokens, flags = zip(*itertools.islice(conversations, DEMO_BATCH))
        inputs, learned = row[torch.tensor(tokens)], torch.tensor(flags)[:, 1:]
        hidden = demo_forward(weights, inputs[:, :-1])[learned]
        loss = F.cross_entropy(hidden @ weights["output.weight"].T, inputs[:, 1:][learned])
        # Adam (Kingma and Ba 2014), by hand: to import torch.optim takes a third of the training's time.
        rate = DEMO_RATE * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / DEMO_STEPS))
        with torch.no_grad():
            for weight, slope, (mean, square) in zip(parameters, torch.autograd.grad(loss, parameters), moments):
                mean.lerp_(slope, 0.1)
                square.lerp_(slope.square(), 0.05)
                scale = (square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                weight -= rate / (1 - 0.9 ** (step + 1)) * mean / scale
    finished = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    finished["norm.weight"] *= DEMO_SHARPNESS
    return finished | {name: finished[name][row] for name in ("tok_embeddings.weight", "output.weight")}


def demo_weights(known: int) -> dict[str, torch.Tensor]:
    """Random weights, with an output row and an embedding for each of `known` tokens.

    Every head starts with a preference for near tokens, which would take most of the training to learn: coordinate 0
    is equal in all embeddings, and queries and keys copy it into rotary pairs of middle frequencies.
    """
    config, generator = DEMO_CONFIG, torch.Generator().manual_seed(0)
    shapes = {name: shape for name, (_, shape) in config.weights().items()}
    shapes |= dict.fromkeys(("output.weight", "tok_embeddings.weight"), (known, config.dim))
    weights = {}
    for name, shape in shapes.items():
        scale = 0.25 if "tok_" in name else 0.0 if name.endswith(("wo.weight", "w2.weight")) else shape[-1] ** -0.5
        weights[name] = torch.randn(shape, generator=generator) * scale if len(shape) == 2 else torch.ones(shape)
        if name.endswith(("wq.weight", "wk.weight")):
            weights[name].view(-1, config.head_dim // 2, 2, config.dim)[:, 3:10, 0, 0] = 1.2
    weights["tok_embeddings.weight"][:, 0] = 0.75
    return weights


def demo_forward(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Llama 3 with gradients: tokens [B, T] to the last hidden states [B, T, dim]. Rotary pairs are adjacent (Meta)."""
    config = DEMO_CONFIG
    turns = torch.complex(*rotary_tables(config, tokens.shape[1]))  # [T, head_dim / 2]

    def heads(rows: torch.Tensor, turned: bool) -> torch.Tensor:
        rows = rows.view(*tokens.shape, -1, config.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]
        if turned:
            pairs = torch.view_as_complex(rows.reshape(*rows.shape[:-1], -1, 2))
            rows = torch.view_as_real(pairs * turns).flatten(-2)
        return rows.repeat_interleave(config.n_heads // rows.shape[1], 1)

    x = weights["tok_embeddings.weight"][tokens]
    for i in range(config.n_layers):
        layer = {name[9:-7]: weight.t() for name, weight in weights.items() if name.startswith(f"layers.{i}.")}
        rows = rms_norm(x, layer["attention_norm"], config.norm_eps)
        q, k, v = (heads(rows @ layer[f"attention.w{name}"], turned=name != "v") for name in "qkv")
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.transpose(1, 2).flatten(2) @ layer["attention.wo"]
        rows = rms_norm(x, layer["ffn_norm"], config.norm_eps)
        x = x + (F.silu(rows @ layer["feed_forward.w1"]) * (rows @ layer["feed_forward.w3"])) @ layer["feed_forward.w2"]
    return rms_norm(x, weights["norm.weight"], config.norm_eps)


# ======================================================================================================================
# Scheduler
# ======================================================================================================================


STREAM_PAUSE = 0.006  # seconds that a handler's thread lets tokens gather before it looks for more


class Piece(NamedTuple):
    """A piece of an answer; some of its parts may be empty."""

    thinking: str
    text: str
    calls: list[Call]


@dataclass(eq=False)
class Request:
    """One request for text, on its way down to the engine and back."""

    # The dialect fills these.
    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    stop_tokens: frozenset[int]  # token ids that end the answer and are not part of it
    text: TextStream  # knows the stop strings
    thoughts: Thoughts
    finder: CallFinder
    fields: dict[str, Any]  # as the client sent them
    index: int = 0  # among the requests of one body
    echo: str = ""  # the prompt, which comes before the answer; the dialect writes it once
    scored: bool = False  # the log-probabilities of the prompt are wanted, too
    # The scheduler fills these. Times are by time.monotonic().
    submitted: float = 0.0
    admitted: float = 0.0  # when it got a slot
    first_token: float = 0.0  # a stop token counts
    last_token: float = 0.0
    generated: int = 0  # tokens, without the stop token
    cached: int = 0  # prompt tokens that were in the KV cache already
    outcome: str = ""  # "stop", "length", "cancelled" or "error", once it has ended
    cancelled: str = ""  # if set, the request ends before the next step, with this outcome
    tokens: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)  # None is the end
    ended: threading.Event = field(default_factory=threading.Event)
    # The handler fills these.
    thinking: str = ""
    answer: str = ""
    calls: list[Call] = field(default_factory=list)
    count: int = 0  # tokens of all three
    seconds: float = 0.0  # from submission to the last of them
    told: int = 0  # tokens whose log-probabilities the dialect has written
    offset: int = 0  # characters of these tokens, which the decoder counts
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def pieces(self, pause: float = STREAM_PAUSE) -> Iterator[Piece]:
        """The answer, piece by piece; the handler's thread calls this. Raises ApiError if it breaks off.

        With `stream` or stop strings, the first token comes at once and the others 6 ms late: if 32 threads woke when a
        step ends, they would delay the next step. Otherwise all come at the end.
        """
        if not (self.fields["stream"] or self.fields["stop"]):
            self.ended.wait()
        tokens: list[int | None] = []
        while not self.text.stopped and None not in tokens:
            tokens, piece = [self.tokens.get()], ""
            time.sleep(pause if self.count else 0.0)
            while not self.tokens.empty():
                tokens.append(self.tokens.get())
            for token in tokens:  # one by one: a stop string ends the count at its own last token
                piece += self.text.push([], final=True) if token is None else self.text.push([token])
                self.count += token is not None
                if self.text.stopped:
                    break
            self.seconds = time.monotonic() - self.submitted
            final = self.text.stopped or None in tokens
            thinking, answer = self.thoughts.split(piece, final)
            answer, calls = self.finder.split(answer, final)
            self.thinking, self.answer, self.calls = self.thinking + thinking, self.answer + answer, self.calls + calls
            if thinking or answer or calls:
                yield Piece(thinking, answer, calls)
        if self.finish_reason == "error":
            raise ApiError(500, "the engine failed on this request: the server's log says why; send it again")
        if self.finish_reason == "cancelled":
            raise ApiError(503, "the server stopped before the answer was complete: send the request again")

    @property
    def finish_reason(self) -> str:
        """The outcome, as the client sees it."""
        return "stop" if self.text.stopped else self.outcome

    def figures(self) -> dict[str, Any]:
        """The figures that /chat and the log give."""
        return {
            "tokens_generated": self.count,
            "time_seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.count / max(self.seconds, 1e-9), 1),
            "prompt_tokens": len(self.prompt),
            "time_to_first_token_seconds": round((self.first_token or time.monotonic()) - self.submitted, 3),
            "finish_reason": self.finish_reason,
        }


@dataclass
class Slot:
    """One place in the engine's batch. Its tokens stay after an answer, for a request that starts with the same."""

    index: int
    request: Request | None = None
    tokens: list[int] = field(default_factory=list)  # prompt and answer
    held: int = 0  # how many of them are in the KV cache
    used: float = 0.0  # when the last request left

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV cache yet: 1 during decode, more during prefill."""
        return len(self.tokens) - self.held

    def common(self, request: Request) -> int:
        """How many tokens of the prompt are in the KV cache. A token whose logits are needed does not count."""
        most = 0 if request.scored else min(self.held, len(request.prompt) - 1)
        return next((i for i, (held, new) in enumerate(zip(self.tokens[:most], request.prompt)) if held != new), most)


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
BOUNDS = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]  # 1 ms, or 1 token, to 5e4


class Statistics:
    """Counts since the start. Every accepted request finishes once, so they add up."""

    def __init__(self) -> None:
        self.accepted = self.cached_tokens = 0
        self.finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self.counts = {name: [0] * (len(BOUNDS) + 1) for name in HISTOGRAMS}  # by upper bound; the last has none
        self.sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def observe(self, name: str, value: float) -> None:
        """Count a value in a histogram."""
        self.counts[name][bisect.bisect_left(BOUNDS, value)] += 1
        self.sums[name] += value

    def finish(self, request: Request) -> None:
        """Count a request that has ended."""
        now, submitted, admitted, first = time.monotonic(), request.submitted, request.admitted, request.first_token
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

    Requests join and leave between two steps, first come, first served. A step decodes a token for every running
    answer, and prefills as many prompt tokens as keep it short.
    """

    PROMPT_BUDGET = 16  # prompt tokens in a step beside running answers, and one more for each of them
    PROMPTS_BUDGET = 512  # prompt tokens in a step while more prompts wait than answers run
    FAILURES = 3  # failed steps in a row that make the server unhealthy
    STALL_SECONDS = 120.0  # a step that takes longer counts as hung

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.max_seq_len = self.slot_share = 0  # tokens that one slot can hold, and that all can at the same time
        self.device = ""
        self.scores_prompts = True
        self.doing: tuple[str, float | None] = ("starting", None)
        self.statistics = Statistics()
        self.slots: list[Slot] = []
        self.queue: deque[Request] = deque()
        self._state, self._error = "loading", ""
        # Guards the state, the queue and the statistics. Only the scheduler's thread changes the slots.
        self._wake = threading.Condition()
        self._failures = 0
        self._step_began = math.inf

    # The handlers' threads call:

    @property
    def state(self) -> str:
        """One of "loading", "healthy", "unhealthy" and "stopping"."""
        return "unhealthy" if self._state == "healthy" and self.error else self._state

    @property
    def error(self) -> str:
        """Why the server is unhealthy: the engine is broken, or a step does not return."""
        seconds = time.monotonic() - self._step_began
        return f"a step has not returned for {seconds:.0f} seconds" if seconds > self.STALL_SECONDS else self._error

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
                raise ApiError(400, f"{len(requests)} answers are more than the queue can hold: ask for fewer")
            if len(self.queue) + len(requests) > self.max_queue + len(self.slots) - self.busy:
                raise ApiError(503, f"the queue is full ({self.max_queue} requests wait): try again in a moment")
            for request in requests:
                request.submitted = time.monotonic()
            self.statistics.accepted += len(requests)
            self.queue.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request, outcome: str = "cancelled") -> None:
        """End a request, queued or running, before the next step. The outcome "stop" says that its text is complete."""
        with self._wake:
            if request.outcome:
                return
            request.cancelled = outcome
            if request in self.queue:
                self.queue.remove(request)
                self._finish(request, outcome)
            self._wake.notify()

    def stop(self, drain: bool) -> None:
        """Accept no more requests. Let `run` return after the current ones with `drain`, else after this step."""
        with self._wake:
            self._state = "stopping"
            for request in [] if drain else self._in_flight():
                self.cancel(request)
            self._wake.notify_all()

    def wait_for_stop(self) -> None:
        """Return once stop() is called."""
        with self._wake:
            self._wake.wait_for(lambda: self._state == "stopping")

    @property
    def busy(self) -> int:
        """Slots with a request."""
        return sum(slot.request is not None for slot in self.slots)

    @property
    def kv_cache_use(self) -> float:
        """The share of the KV cache that requests have reserved, 0 to 1."""
        requests = [slot.request for slot in self.slots if slot.request]
        reserved = sum(len(request.prompt) + request.max_tokens for request in requests)
        return reserved / self._engine.kv_cache_tokens if reserved else 0.0

    def _in_flight(self) -> list[Request]:
        return list(filter(None, [*self.queue, *(slot.request for slot in self.slots)]))

    def _finish(self, request: Request, outcome: str) -> None:
        with self._wake:
            request.outcome = outcome
            self.statistics.finish(request)
            request.tokens.put(None)
            request.ended.set()

    # The scheduler's own thread:

    def run(self, load: Callable[[Progress], Engine], progress: Progress, ready: Callable[[], None]) -> None:
        """Load the engine, serve requests until stop() or until the engine breaks, and close it.

        Calls `ready` once requests are accepted. Raises UserError if loading does.
        """

        def report(doing: str, done: float | None = None) -> None:
            if self._state == "stopping":
                raise KeyboardInterrupt
            self.doing = (doing, done)
            progress(doing, done)

        try:
            with contextlib.closing(load(report)) as engine:
                report("ready", 1.0)
                self._engine = engine
                with self._wake:
                    self.slots = [Slot(index) for index in range(engine.max_batch_size)]
                    self.max_seq_len, self.device = engine.max_seq_len, engine.device
                    self.scores_prompts = engine.scores_prompts
                    self.slot_share = engine.kv_cache_tokens // engine.max_batch_size
                    self._state = "healthy" if self._state == "loading" else self._state
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
                self._wake.wait_for(lambda: self.queue or self._state != "healthy" or self.busy)
                for slot in self.slots:
                    if slot.request and slot.request.cancelled:
                        self._leave(slot, slot.request.cancelled)
                self._admit()
                if self._state != "healthy" and not self._in_flight():
                    return
            if batch := self._plan():
                self._step(batch)

    def _admit(self) -> None:
        """Give free slots to the oldest requests, while the engine has room for them."""
        align = self._engine.resume_align
        while self.queue and (free := [slot for slot in self.slots if slot.request is None]):
            request = self.queue[0]
            length = len(request.prompt) + request.max_tokens
            # Best is the slot with most of this prompt, unless it mostly holds another chat; then an empty slot; then
            # the least recently used. An engine may have several memory pools, so the next best may have room when the
            # best has none.
            common = {slot.index: slot.common(request) for slot in free}
            own = {slot.index: common[slot.index] if 2 * common[slot.index] > slot.held else 0 for slot in free}
            free.sort(key=lambda slot: (-own[slot.index], bool(slot.held), slot.used))
            # If none has room, idle slots give up what they keep: the least recently used first, the best match last.
            kept = sorted((slot for slot in free if slot.held), key=lambda slot: (own[slot.index], slot.used))
            while not (slot := next((s for s in free if self._engine.reserve(s.index, length)), None)) and kept:
                self._keep(kept.pop(0), 0)
            if slot is None:
                return  # until another request has ended
            self.queue.popleft()
            request.admitted = time.monotonic()
            slot.held = request.cached = min(common[slot.index], slot.held) // align * align
            slot.request, slot.tokens = request, list(request.prompt)

    def _plan(self) -> list[Work]:
        """The next step: the last token of every running answer, then the oldest prompts within the budget."""
        busy = [(slot, slot.request) for slot in self.slots if slot.request]
        batch = [Work(slot.index, slot.tokens[-1:], slot.held, r.sampling) for slot, r in busy if slot.pending == 1]
        prompts = [(slot, request) for slot, request in busy if slot.pending > 1]
        chunk = self._engine.prompt_chunk
        align = max(self._engine.resume_align, 16)  # in bfloat16, cuts at multiples of 16 do not change the logits
        few = max(self.PROMPT_BUDGET + len(batch), align)
        budget = (chunk or self.PROMPTS_BUDGET) if len(prompts) > len(batch) else few
        begun: list[list[int]] = []
        for slot, request in sorted(prompts, key=lambda prompt: prompt[1].submitted):
            if copy := self._engine.copy:
                if request.prompt in begun and not request.scored:
                    continue  # until the other prefill of this prompt is done, and can be copied
                common, source = max((other.common(request), other.index) for other in self.slots)
                if common > slot.held:
                    copy(source, slot.index, slot.held, common)
                    request.cached += common - slot.held
                    slot.held = common
                if slot.pending > 1:
                    begun.append(request.prompt)
            end = len(slot.tokens)
            if chunk and slot.pending > budget:
                end = (slot.held + budget) // align * align
            if budget <= 0 or end <= slot.held:
                break
            budget -= max(end - slot.held, self._engine.resume_align)  # a card pads shorter ones to that
            sampling = request.sampling if end == len(slot.tokens) else None
            scores = request.sampling.host if request.scored else None
            batch.append(Work(slot.index, slot.tokens[slot.held : end], slot.held, sampling, scores))
        return batch

    def _step(self, batch: list[Work]) -> None:
        """Run one step. If it fails, its requests fail, and all others go on."""
        self._step_began = time.monotonic()
        try:
            tokens = self._engine.step(batch)
        except Exception as error:
            logger.error("the engine failed on a step of %d requests", len(batch), exc_info=error)
            for work in batch:
                self._leave(self.slots[work.slot], "error")
            self._failures += 1
            if self._failures >= self.FAILURES:
                self._mark_broken(f"{self._failures} steps in a row failed, the last with {type(error).__name__}")
            return
        finally:
            self._step_began = math.inf
        now = time.monotonic()
        for work, token in zip(batch, tokens):
            slot = self.slots[work.slot]
            slot.held += len(work.tokens)
            request = slot.request
            if work.sampling is None or request is None:
                continue
            if request.generated:
                self.statistics.observe("inter_token_latency_seconds", now - request.last_token)
            request.first_token, request.last_token = request.first_token or now, now
            host = request.sampling.host
            if token in request.stop_tokens or not request.max_tokens:
                cut = not request.max_tokens or (host and host.constraint and host.constraint.failed)
                self._leave(slot, "length" if cut else "stop")
                continue
            slot.tokens.append(token)
            request.generated += 1
            if host:
                host.push(token)
            request.tokens.put(token)
            if request.generated >= request.max_tokens:
                self._leave(slot, "length")

    def _leave(self, slot: Slot, outcome: str) -> None:
        """End the slot's request."""
        assert slot.request is not None
        if outcome in ("stop", "length"):  # a whole answer, since a card may fail at every decode but at no prefill
            self._failures = 0
        self._finish(slot.request, outcome)
        slot.request, slot.used = None, time.monotonic()
        # After an error the slot's KV cache cannot be trusted.
        self._keep(slot, slot.held if self._engine.prompt_chunk and outcome != "error" else 0)

    def _keep(self, slot: Slot, held: int) -> None:
        """Keep `held` tokens of an idle slot for a request that starts with them, and give back the other room."""
        slot.held = held
        del slot.tokens[held:]
        self._engine.reserve(slot.index, held)

    def _mark_broken(self, error: str) -> None:
        """The engine cannot go on: end all requests."""
        with self._wake:
            self._error = self._error or error
            self._state = "stopping" if self._state == "stopping" else "unhealthy"
            for request in self._in_flight():
                self._finish(request, "error")
            self.queue.clear()
            for slot in self.slots:  # without reserve(): the engine may be closed
                slot.request = None


# ======================================================================================================================
# Dialects
# ======================================================================================================================

Check = tuple[str, Callable[[Any], bool]]  # what a field must be, in words, and the test for it
Table = Mapping[str, tuple[Any, Check]]  # a field's name to its default, or ... if it is required, and its check


def between(low: float, high: float, must: str, kinds: tuple[type, ...] = (int,)) -> Check:
    """A number of one of these types from low to high; `must` says so in words."""
    return must, lambda v: type(v) in kinds and low <= v <= high


def number(low: float, high: float) -> Check:
    """Any number from low to high."""
    return between(low, high, f"a number from {low} to {high}", (int, float))


def are_ids(value: Any) -> bool:
    """Whether the value is a list of token ids."""
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def prompts(value: Any) -> list[str | list[int]]:
    """The prompts, text or token ids, of a field that holds one or a list of them; [] if it holds anything else."""
    several = value if isinstance(value, list) and not are_ids(value) else [value]
    fits = len(several) <= 64 and all(prompt and (isinstance(prompt, str) or are_ids(prompt)) for prompt in several)
    return several if fits else []


def one_of(names: Iterable[str]) -> Check:
    """A string that is one of these."""
    return f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names


IDS: Check = "a list of token ids", are_ids
FLAG: Check = "true or false", lambda v: type(v) is bool
TEXT: Check = "a string", lambda v: isinstance(v, str)
NONEMPTY: Check = "a string that is not empty", lambda v: isinstance(v, str) and v != ""
LIMIT: Check = "a whole number from 1, or -1 for no limit", lambda v: type(v) is int and (v == -1 or v >= 1)
LIMIT_OR_0: Check = between(-1, math.inf, "a whole number from -1, which is no limit")
MESSAGES: Check = 'a list of at least one {"role": ..., "content": ...}', lambda v: isinstance(v, list) and bool(v)
STOP: Check = (
    "a string or a list of up to 16 strings, none of them empty",
    lambda v: len(as_list(v)) <= 16 and all(isinstance(stop, str) and stop for stop in as_list(v)),
)
PROMPT: Check = "a string or a list of token ids, not empty, or a list of up to 64 of them", lambda v: bool(prompts(v))
OBJECT: Check = "an object", lambda v: isinstance(v, dict)
CONTENT: Check = "a string or a list of text parts", lambda v: isinstance(v, (str, list))
MESSAGE: Table = {"content": (..., CONTENT)}
ASSISTANT: Table = {
    "content": ("", CONTENT),
    "reasoning_content": ("", TEXT),
    "tool_calls": ([], ("a list of calls", lambda v: isinstance(v, list))),
}
TOOL_RESULT: Table = {**MESSAGE, "tool_call_id": (..., TEXT)}
TYPE: Check = '"function"', lambda v: v == "function"
TOOL: Table = {"type": (..., TYPE), "function": (..., OBJECT)}
FUNCTION: Table = {
    "name": (..., NONEMPTY),
    "parameters": ({"type": "object", "additionalProperties": False}, OBJECT),
    "strict": (False, FLAG),
}
CALL: Table = {"id": (..., TEXT), "type": ("function", TYPE), "function": (..., OBJECT)}
CALLED: Table = {
    "name": (..., NONEMPTY),
    "arguments": (..., ("a JSON object in a string", lambda v: isinstance(v, str) and json_object(v) is not None)),
}
CHOICE: Check = (
    'none, auto, required or {"type": "function", "function": {"name": ...}}',
    lambda v: v in ("none", "auto", "required") or isinstance(v, dict),
)
RESPONSE_FORMAT: Table = {
    "type": (..., one_of(("text", "json_object", "json_schema"))),
    "json_schema": (None, OBJECT),
    "schema": ({"type": "object"}, OBJECT),  # llama.cpp's, of a json_object
}
STRUCTURED_OUTPUTS: Table = {
    "json": (None, OBJECT),
    "regex": (None, NONEMPTY),
    "choice": (None, ("a list of strings", lambda v: isinstance(v, list) and v != [] and all(map(TEXT[1], v)))),
    "grammar": (None, NONEMPTY),
}
TEMPLATE_OPTIONS: Check = (
    '{"enable_thinking": true or false}',
    lambda v: (
        isinstance(v, dict) and v.keys() <= {"enable_thinking"} and all(type(flag) is bool for flag in v.values())
    ),
)
PART: Table = {"type": (..., ('"text"', lambda v: v == "text")), "text": (..., TEXT)}


def sampling_fields(temperature: float, top_p: float) -> Table:
    """The fields that every dialect has, with the dialect's defaults."""
    return {
        "temperature": (temperature, number(0, 2)),
        "top_p": (top_p, number(0, 1)),
        "top_k": (0, between(-1, math.inf, "a whole number from -1")),
        "seed": (None, between(-(2**63), 2**64 - 1, "a whole number that fits in 64 bits")),
        "stop": ([], STOP),
        "stream": (False, FLAG),
    }


BIAS = number(-100, 100)
BIASES: Check = (
    f"an object of token ids, each with {BIAS[0]}",
    lambda v: isinstance(v, dict) and all(re.fullmatch("[0-9]{1,9}", id) and BIAS[1](bias) for id, bias in v.items()),
)
HOST_SAMPLING: Table = {  # the arguments of HostSampling
    "logit_bias": ({}, BIASES),
    "min_tokens": (0, between(0, math.inf, "a whole number from 0")),
    "repetition_penalty": (1, number(0.01, 100)),
    "frequency_penalty": (0, number(-2, 2)),
    "presence_penalty": (0, number(-2, 2)),
    "min_p": (0, number(0, 1)),
    "logprobs": (None, ("a whole number from 0 to 20", lambda v: v is False or (type(v) is int and 0 <= v <= 20))),
}

# Fields of OpenAI, vLLM and llama.cpp that would change the answer and are not supported, at any level, with the values
# that ask for nothing.
UNSUPPORTED: dict[str, list[Any]] = {
    "best_of": [1], "bad_words": [[]], "repeat_penalty": [1], "typical_p": [1], "mirostat": [0], "mirostat_mode": [0],
    "xtc_probability": [0], "dry_multiplier": [0], "use_beam_search": [False], "top_logprobs": [0],
    "prompt_logprobs": [], "guided_json": [], "guided_regex": [], "guided_choice": [], "guided_grammar": [],
    "json_schema": [], "grammar": [""],
    "functions": [[]], "function_call": ["none", "auto"], "modalities": [["text"]], "audio": [],
    "web_search_options": [], "chat_template": [], "chat_template_kwargs": [{}], "documents": [[]], "echo": [False],
    "suffix": [""],
}  # fmt: skip


class Dialect:
    """The JSON of one kind of client. This class is POST /chat, which streams one JSON object a line."""

    fields: ClassVar[Table] = {
        "prompt": (None, NONEMPTY),
        "messages": (None, MESSAGES),
        "system": (None, TEXT),
        "max_tokens": (None, between(1, math.inf, "a whole number from 1")),
        "chat_template_kwargs": ({}, TEMPLATE_OPTIONS),
        **sampling_fields(temperature=0.7, top_p=0.9),
    }
    # The roles of messages: their names for the chat template, and their fields.
    roles: ClassVar[dict[str, tuple[str, Table]]] = {
        "system": ("system", MESSAGE),
        "developer": ("system", MESSAGE),
        "user": ("user", MESSAGE),
        "assistant": ("assistant", MESSAGE),
    }
    content_type = "application/x-ndjson"  # of a stream
    default_max_tokens: int | None = 128  # None: the rest of the context
    limit_name, messages_name = "max_tokens", "messages"
    part: ClassVar[Table] = PART
    example = '{"prompt": "Hello!"}'

    def __init__(self, server: ApiServer) -> None:
        self.server = server

    def unknown(self, name: str, value: Any, table: Table, where: str) -> None:
        """Handle a field that is not in the table. /chat is our own API: refuse the field, and suggest the nearest."""
        path = f"{where}{printable(name)}"
        near = [known for known in table if known.startswith(name)] or difflib.get_close_matches(name, table, 1)
        hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(table)}"
        raise ApiError(400, f"unknown field {path}: {hint}", path)

    def check(self, body: Any, table: Table, where: str = "") -> dict[str, Any]:
        """Check a JSON object and fill in the defaults; null counts as absent. Raises ApiError."""
        if not isinstance(body, dict):
            raise ApiError(400, f"{where or 'the body'} must be a JSON object, not {shown(body)}", where or None)
        prefix = f"{where}." if where else ""
        for name, value in body.items():
            if name not in table and value is not None:
                self.unknown(name, value, table, prefix)
        fields = {}
        for name, (default, (must, fits)) in table.items():
            value, path = body.get(name), f"{prefix}{name}"
            if value is None and default is ...:
                raise ApiError(400, f"{path} is missing: it must be {must}", path)
            if value is not None and not fits(value):
                raise ApiError(400, f"{path} must be {must}, not {shown(value)}", path)
            fields[name] = default if value is None else value
        return fields

    def read(self, body: Any) -> list[Request]:
        """Make Requests of a body: `n` for each prompt. Raises ApiError."""
        fields = self.check(body, self.fields)
        each = [prompt for prompt in self.encode(fields) for _ in range(fields.get("n", 1))]
        return [self.request(fields, prompt, index) for index, prompt in enumerate(each)]

    def request(self, fields: dict[str, Any], prompt: list[int], index: int) -> Request:
        """Make one Request. Raises ApiError."""
        if not prompt:
            raise ApiError(400, "the prompt is empty: send text")
        context = self.server.scheduler.max_seq_len
        room = context - len(prompt)
        limit = fields.get("max_completion_tokens") or fields["max_tokens"]
        limit = None if limit == -1 else limit
        if max(limit or 0, 1) > room:
            name = self.limit_name
            param = name if room > 0 else "prompt" if fields.get("messages") is None else self.messages_name
            asked = f" and {name} is {shown(limit)}" if limit else ""
            cure = f"shorten the prompt or lower {name}"
            message = f"the prompt has {len(prompt)} tokens{asked}, but the context holds {context} in all: {cure}"
            raise ApiError(400, message, param, "context_length_exceeded")
        # A slot's cache is reserved for the whole answer before it starts. If the cache cannot hold the full context
        # for all slots at once, as on a card, an answer without a limit gets its slot's share.
        default = self.default_max_tokens or max(self.server.scheduler.slot_share, 1024)
        # As in vLLM and llama.cpp, -1 stands for no seed and for no top_k. As in vLLM, the `n` answers differ.
        seed = None if fields["seed"] in (None, -1) else fields["seed"] + index % fields.get("n", 1)
        stop_tokens = frozenset(fields.get("stop_token_ids", ()))
        self.check_tokens(stop_tokens, "stop_token_ids")
        stop_tokens |= frozenset() if fields.get("ignore_eos") else self.server.tokenizer.stop_tokens
        thoughts = self.thoughts(fields, prompt)
        host = self.host_sampling(fields, prompt, stop_tokens, thoughts)
        marked = bool(host and host.constraint and host.constraint.marked)
        return Request(
            prompt=prompt,
            max_tokens=min(default, room) if limit is None else limit,
            sampling=SamplingParams(fields["temperature"], fields["top_p"], max(0, fields["top_k"]), seed, host),
            stop_tokens=stop_tokens,
            text=TextStream(self.server.tokenizer, as_list(fields["stop"])),
            thoughts=thoughts,
            finder=CallFinder((function["name"] for function in fields.get("functions", ())), marked),
            fields=fields,
            index=index,
        )

    def host_sampling(
        self, fields: dict[str, Any], prompt: list[int], stop_tokens: frozenset[int], thoughts: Thoughts
    ) -> HostSampling | None:
        """What the fields ask of the host's sampler; None if nothing. Raises ApiError."""
        asked = {name: fields[name] for name, (none, _) in HOST_SAMPLING.items() if fields.get(name, none) != none}
        constraint = self.constraint(fields, thoughts)
        if not asked and not constraint:
            return None
        self.check_tokens(map(int, fields["logit_bias"]), "logit_bias")
        return HostSampling(prompt, stop_tokens, constraint=constraint, always=bool(asked), **asked)

    def constraint(self, fields: dict[str, Any], thoughts: Thoughts) -> Constraint | None:
        """The grammar that the answer has to follow, if any. Raises ApiError."""
        return None

    def check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """Raise ApiError for a token id beyond the vocabulary."""
        highest, size = max(tokens, default=0), self.server.tokenizer.vocab_size
        if highest >= size:
            raise ApiError(400, f"{param} has the token id {highest}: ids end at {size - 1}", param)

    def encode(self, fields: dict[str, Any]) -> list[list[int]]:
        """The token ids of each prompt. Raises ApiError."""
        messages, prompt = fields["messages"], fields["prompt"]
        if messages is not None and prompt is not None:
            raise ApiError(400, "send prompt or messages, not both")
        if messages is None and prompt is None:
            raise ApiError(400, f"send prompt, a string, or messages, a list: for example {self.example}")
        system = [] if fields["system"] is None else [{"role": "system", "content": fields["system"]}]
        chat = self.conversation([{"role": "user", "content": prompt}] if messages is None else messages)
        fields["prompt"] = chat[-1]["content"]  # the answer repeats it
        return [self.encode_chat([*system, *chat], fields)]

    def encode_chat(self, chat: list[Message], fields: dict[str, Any], tools: Sequence[Message] = ()) -> list[int]:
        """The token ids of a conversation. Raises ApiError."""
        tokenizer, thinking = self.server.tokenizer, fields["chat_template_kwargs"].get("enable_thinking", False)
        if thinking and not tokenizer.thinks:
            raise ApiError(400, "this model's template has no enable_thinking: leave it out", "chat_template_kwargs")
        return tokenizer.encode_chat(chat, tools, thinking)

    def thoughts(self, fields: dict[str, Any], prompt: list[int]) -> Thoughts:
        """The splitter of thinking and answer for this prompt."""
        goes_on = fields.get("continue_final_message")
        return Thoughts("answer") if goes_on else Thoughts.after(self.server.tokenizer, prompt)

    def conversation(self, messages: list[Any]) -> list[Message]:
        """The messages for the chat template. Raises ApiError."""
        chat: list[Message] = []
        for i, message in enumerate(messages):
            where, role = f"messages[{i}]", message.get("role") if isinstance(message, dict) else None
            name, table = self.roles.get(str(role), ("", MESSAGE))
            fields = self.check(message, {"role": (..., one_of(self.roles)), **table}, where)
            fields["content"] = self.text(fields["content"], f"{where}.content")
            calls = [
                self.called(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(fields.get("tool_calls", ()))
            ]
            if "tool_call_id" in fields:
                fields["tool_call_id"] = short_id(fields["tool_call_id"])
            fields |= {"role": name, "tool_calls": calls}
            chat.append({name: value for name, value in fields.items() if value or name == "content"})
        return chat

    def text(self, content: Any, where: str) -> str:
        """The text of a string or of a list of parts. Raises ApiError."""
        if isinstance(content, list):
            parts = [self.check(part, self.part, f"{where}[{j}]") for j, part in enumerate(content)]
            return "".join(part["text"] for part in parts)
        return str(content)

    def called(self, call: Any, where: str) -> Message:
        """A tool call of a message for the chat template. Raises ApiError."""
        fields = self.check(call, CALL, where)
        function = self.check(fields["function"], CALLED, f"{where}.function")
        function["arguments"] = json_object(function["arguments"])
        return {"id": short_id(fields["id"]), "type": "function", "function": function}

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        (request,) = requests
        thinking = {"thinking": request.thinking} if request.thinking else {}
        answer = {"success": True, "prompt": request.fields["prompt"], **thinking, "response": request.answer}
        return answer | request.figures()

    def begin(self, requests: Sequence[Request]) -> bytes:
        """The start of a stream, before the first text."""
        return b""

    def piece(self, request: Request, piece: Piece) -> bytes:
        """A piece of the answer in a stream."""
        return self.line(
            {name: part for name, part in (("thinking", piece.thinking), ("response", piece.text)) if part}
        )

    def end(self, request: Request) -> bytes:
        """The end of one answer in a stream."""
        return self.line({"done": True, **self.whole([request])})

    def close(self, requests: Sequence[Request]) -> bytes:
        """The end of a stream."""
        return b""

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body of an error."""
        return {"error": str(error)}

    def broken(self, error: ApiError) -> bytes:
        """The end of a stream that breaks off."""
        return self.line(self.error(error))

    def line(self, value: dict[str, Any]) -> bytes:
        """One item of a stream."""
        return to_json(value)


class ChatCompletions(Dialect):
    """POST /v1/chat/completions: OpenAI's JSON, or server-sent events.

    Client programs choose these fields. A field that would change the answer and is not supported is refused; every
    other unknown field is ignored. Source: https://platform.openai.com/docs/api-reference/chat/create
    """

    common: ClassVar[Table] = {
        "model": (None, TEXT),
        "max_tokens": (None, LIMIT),  # LM Studio and llama.cpp have -1
        **sampling_fields(temperature=1.0, top_p=1.0),
        "stream_options": ({}, OBJECT),
        "n": (1, between(1, 16, "a whole number from 1 to 16")),
        "ignore_eos": (False, FLAG),  # vLLM's, for benchmarks: generate max_tokens tokens
        "stop_token_ids": ([], IDS),
        **HOST_SAMPLING,
        "response_format": ({"type": "text"}, OBJECT),
        "structured_outputs": ({}, OBJECT),  # vLLM's
    }
    fields: ClassVar[Table] = {
        "messages": (..., MESSAGES),
        "max_completion_tokens": (None, LIMIT),
        "chat_template_kwargs": ({}, TEMPLATE_OPTIONS),
        **common,
        "add_generation_prompt": (None, FLAG),
        "continue_final_message": (False, FLAG),
        "logprobs": (False, FLAG),
        "top_logprobs": (0, between(0, 20, "a whole number from 0 to 20")),
        "tools": ([], ("a list of functions", lambda v: isinstance(v, list))),
        "tool_choice": ("auto", CHOICE),
        "parallel_tool_calls": (True, FLAG),
    }
    roles: ClassVar[dict[str, tuple[str, Table]]] = {
        **Dialect.roles,
        "assistant": ("assistant", ASSISTANT),
        "tool": ("tool", TOOL_RESULT),
    }
    content_type = "text/event-stream"
    default_max_tokens: int | None = None
    example = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def unknown(self, name: str, value: Any, table: Table, where: str) -> None:
        if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            path = f"{where}{name}"
            raise ApiError(400, f"{path} is not supported here: leave it out", path, "unsupported_parameter")

    def read(self, body: Any) -> list[Request]:
        requests = super().read(body)
        fields = requests[0].fields  # all have the same
        check_model(fields["model"] or self.server.model, self.server.model)
        options = self.check(fields["stream_options"], {"include_usage": (False, FLAG)}, "stream_options")
        fields |= {**options, "id": f"{self.id_prefix}{uuid.uuid4().hex}", "created": int(time.time())}
        return requests

    def encode(self, fields: dict[str, Any]) -> list[list[int]]:
        if fields["top_logprobs"] and not fields["logprobs"]:
            raise ApiError(400, "top_logprobs needs logprobs: send logprobs as true", "top_logprobs")
        fields["logprobs"] = fields["top_logprobs"] if fields["logprobs"] else None  # HostSampling's
        chat, goes_on = self.conversation(fields["messages"]), fields["continue_final_message"]
        if fields["add_generation_prompt"] is goes_on:
            name = "add_generation_prompt"
            raise ApiError(400, f"{name} must be the opposite of continue_final_message: leave it out", name)
        if goes_on and chat[-1]["role"] != "assistant":
            raise ApiError(400, "continue_final_message needs a last message of the assistant", "messages")
        start = chat.pop()["content"] if goes_on else ""
        fields["functions"] = self.functions(fields)
        # `strict` is not for the model.
        tools = [
            {**tool, "function": {k: v for k, v in tool["function"].items() if k != "strict"}}
            for tool in fields["tools"]
        ]
        tokens = self.encode_chat(chat, fields, tools if fields["functions"] else ())
        return [tokens + self.server.tokenizer.encode_text(start)]

    def functions(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        """The functions that the model may call, by tools and tool_choice. Raises ApiError."""
        functions: list[dict[str, Any]] = []
        choice = fields["tool_choice"]
        for i, tool in enumerate(fields["tools"]):
            function = self.check(tool, TOOL, f"tools[{i}]")["function"]
            functions.append(self.check(function, FUNCTION, f"tools[{i}].function"))
        if choice == "none" or (not functions and choice == "auto"):
            return []
        if "tools" not in self.server.tokenizer.template.source:
            raise ApiError(400, "this model's chat template has no tools: leave them out", "tools")
        if isinstance(choice, dict):
            function = self.check(choice, TOOL, "tool_choice")["function"]
            name = self.check(function, {"name": (..., NONEMPTY)}, "tool_choice.function")["name"]
            functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ApiError(400, "tool_choice asks for a function that is not in tools: add it there", "tool_choice")
        return functions

    def constraint(self, fields: dict[str, Any], thoughts: Thoughts) -> Constraint | None:
        functions, choice = fields.get("functions", []), fields.get("tool_choice", "auto")
        several = fields.get("parallel_tool_calls", False) and not isinstance(choice, dict)
        thinking = thoughts.state
        if thinking == "start" and not fields["chat_template_kwargs"].get("enable_thinking"):
            thinking = "answer"
        forced = bool(functions) and choice != "auto"
        made = constrain(self.server.tokenizer, functions, answer_rule(self.outputs(fields)), forced, several, thinking)
        if made and fields["min_tokens"]:
            raise ApiError(400, "min_tokens does not go with tools or a response format: leave it out", "min_tokens")
        return made

    def outputs(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What the answer must be, by response_format or structured_outputs, as STRUCTURED_OUTPUTS. Raises ApiError."""
        asked = self.check(fields["response_format"], RESPONSE_FORMAT, "response_format")
        where = "structured_outputs"
        outputs = self.check(fields[where], STRUCTURED_OUTPUTS, where)
        forms = sum(value is not None for value in outputs.values()) + (asked["type"] != "text")
        if forms > 1:
            raise ApiError(400, "structured_outputs and response_format ask for several forms: send one", where)
        if asked["type"] == "json_object":
            outputs["json"] = asked["schema"]
        if asked["type"] == "json_schema":
            inner = self.check(asked["json_schema"], {"schema": (..., OBJECT)}, "response_format.json_schema")
            outputs["json"] = inner["schema"]
        return outputs

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        choices = []
        for request in requests:
            calls = [self._call(call) for call in request.calls]
            content = request.answer or (None if calls else "")
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            more = {"reasoning_content": request.thinking, "tool_calls": calls}  # the first is vLLM's name
            message |= {name: value for name, value in more.items() if value}
            choices.append(self._choice(request, self._finish_reason(request), message=message))
        return self._envelope(requests, self.kind, choices) | self._usage(requests)

    def begin(self, requests: Sequence[Request]) -> bytes:
        return b"".join(self._chunk(request, None, role="assistant", content="") for request in requests)

    def piece(self, request: Request, piece: Piece) -> bytes:
        calls = [{"index": i, **self._call(call)} for i, call in enumerate(piece.calls)]  # all come in one piece
        parts = {"reasoning_content": piece.thinking, "content": piece.text, "tool_calls": calls}
        return self._chunk(request, None, **{name: part for name, part in parts.items() if part})

    def end(self, request: Request) -> bytes:
        return self._chunk(request, self._finish_reason(request))

    def close(self, requests: Sequence[Request]) -> bytes:
        usage = self._envelope(requests, self.chunk_kind, []) | self._usage(requests)
        return (self.line(usage) if requests[0].fields["include_usage"] else b"") + b"data: [DONE]\n\n"

    def tokenize(self, body: Any) -> dict[str, Any]:
        """The answer to vLLM's /tokenize: the ids of a text, or of a chat."""
        if isinstance(body, dict) and "prompt" in body:
            fields = self.check(body, {"prompt": (..., TEXT), "add_special_tokens": (True, FLAG)})
            tokenizer = self.server.tokenizer
            encode = tokenizer.encode_document if fields["add_special_tokens"] else tokenizer.encode_text
            tokens = encode(fields["prompt"])
        else:
            (tokens,) = self.encode(self.check(body, self.fields))
        return {"count": len(tokens), "max_model_len": self.server.scheduler.max_seq_len, "tokens": tokens}

    def detokenize(self, body: Any) -> dict[str, Any]:
        """The answer to vLLM's /detokenize: the text of token ids."""
        tokens = self.check(body, {"tokens": (..., IDS)})["tokens"]
        self.check_tokens(tokens, "tokens")
        return {"prompt": self.server.tokenizer.decode_bytes(tokens).decode(errors="replace")}

    def error(self, error: ApiError) -> dict[str, Any]:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}

    def line(self, value: dict[str, Any]) -> bytes:
        return b"data: " + to_json(value) + b"\n"

    def _envelope(self, requests: Sequence[Request], kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        same = {name: requests[0].fields[name] for name in ("id", "created")}
        return {**same, "object": kind, "model": self.server.model, "choices": choices}

    def _call(self, call: Call) -> dict[str, Any]:
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _finish_reason(self, request: Request) -> str:
        return "tool_calls" if request.calls and request.finish_reason == "stop" else request.finish_reason

    def _choice(self, request: Request, finish_reason: str | None, **content: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(request)
        return {"index": request.index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _reported(self, request: Request) -> int:
        """How many entries of `chosen` belong to the text so far."""
        return request.count

    def _logprobs(self, request: Request) -> dict[str, Any] | None:
        """The log-probabilities of the tokens since the last call; None if there are none."""
        host, end = request.sampling.host, self._reported(request)
        new = host.chosen[request.told : end] if host else []
        request.told = end

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = self.server.tokenizer.decode_bytes([token])
            name = text.decode(errors="backslashreplace") or f"token_id:{token}"  # vLLM's, for a special token
            return {"token": name, "logprob": logprob, "bytes": list(text)}

        content = [{**entry(token, p), "top_logprobs": [entry(*other) for other in top]} for token, p, top in new]
        return {"content": content, "refusal": None} if content else None

    def _chunk(self, request: Request, finish_reason: str | None, **delta: Any) -> bytes:
        choice = self._choice(request, finish_reason, delta=delta)
        return self.line(self._envelope([request], self.chunk_kind, [choice]))

    def _usage(self, requests: Sequence[Request]) -> dict[str, Any]:
        first = requests[:: requests[0].fields["n"]]  # of each prompt
        prompt, count = sum(len(request.prompt) for request in first), sum(request.count for request in requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
        cached = sum(request.cached for request in first)
        return {"usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}}}


class Completions(ChatCompletions):
    """POST /v1/completions: the model continues a plain text, without a chat format."""

    fields: ClassVar[Table] = {
        "prompt": (..., PROMPT),
        **ChatCompletions.common,
        "max_tokens": (None, LIMIT_OR_0),
        "echo": (False, FLAG),
    }
    default_max_tokens = 16  # OpenAI's
    example = Dialect.example
    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"
    begin = Dialect.begin

    def encode(self, fields: dict[str, Any]) -> list[list[int]]:
        encode, fields["prompt"] = self.server.tokenizer.encode_document, prompts(fields["prompt"])
        encoded = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in fields["prompt"]]
        self.check_tokens(itertools.chain(*encoded), "prompt")
        fields["logprobs"] = None if fields["logprobs"] is False else fields["logprobs"]
        return encoded

    def request(self, fields: dict[str, Any], prompt: list[int], index: int) -> Request:
        request = super().request(fields, prompt, index)
        if fields["echo"]:
            text = self.server.tokenizer.decode_bytes(prompt).decode(errors="replace")
            asked = fields["prompt"][index // fields["n"]]
            request.echo = asked if isinstance(asked, str) else text
            request.offset = len(request.echo) - len(text)  # SentencePiece puts a space before a prompt
        host = request.sampling.host
        if fields["echo"] and host and host.logprobs is not None:
            if not self.server.scheduler.scores_prompts:
                message = "echo with logprobs is not supported on a card: leave one of them out"
                raise ApiError(400, message, "echo", "unsupported_parameter")
            request.scored = True
            host.chosen.append((prompt[0], None, []))
        return request

    def thoughts(self, fields: dict[str, Any], prompt: list[int]) -> Thoughts:
        return Thoughts("answer")

    def _choice(self, request: Request, finish_reason: str | None, **content: dict[str, Any]) -> dict[str, Any]:
        text = request.echo + "".join(part.get("content", "") for part in content.values())
        request.echo = ""
        return super()._choice(request, finish_reason) | {"text": text}

    def _reported(self, request: Request) -> int:
        # As in vLLM, a stop token has an entry, and lm_eval relies on one entry after the prompt's.
        whole = request.outcome == "stop" and request.count == request.generated and not request.text.stopped
        return len(request.prompt) * request.scored + request.count + whole

    def _logprobs(self, request: Request) -> dict[str, Any] | None:
        chat = super()._logprobs(request)
        if chat is None:
            return None
        entries = chat["content"]
        lengths = (len(request.decoder.decode(bytes(entry["bytes"]))) for entry in entries)
        *offsets, request.offset = itertools.accumulate(lengths, initial=request.offset)
        likely = [(*entry["top_logprobs"], entry) for entry in entries]
        return {
            "text_offset": [max(0, offset) for offset in offsets],
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {e["token"]: e["logprob"] for e in top if e["logprob"] is not None} or None for top in likely
            ],
        }


RESPONSE: Table = {  # the fields of POST /v1/responses that chat does not have, or has in another form
    "input": (..., ("a string or a list of items, not empty", lambda v: isinstance(v, (str, list)) and bool(v))),
    "instructions": (None, TEXT),
    "max_output_tokens": (None, LIMIT),
    "metadata": ({}, OBJECT),
    "text": ({}, OBJECT),
    "tools": ChatCompletions.fields["tools"],
    "tool_choice": ("auto", ('none, auto, required or {"type": "function", "name": ...}', CHOICE[1])),
    "include": ([], ("a list without message.output_text.logprobs", lambda v: "logprobs" not in str(v))),
}
RESPONSE_UNSUPPORTED: dict[str, list[Any]] = {  # beside UNSUPPORTED
    "previous_response_id": [], "conversation": [], "prompt": [], "store": [False], "background": [False],
    "truncation": ["disabled"], "messages": [], "response_format": [], "n": [1], "logprobs": [False],
}  # fmt: skip
STATELESS = "the server keeps no answers, so send the whole conversation as input"
ITEMS: dict[str, Table] = {
    "message": {"role": (..., one_of(Dialect.roles)), **MESSAGE},
    "reasoning": {"summary": ("", CONTENT), "content": ("", CONTENT)},
    "function_call": {"call_id": (..., TEXT), **CALLED},
    "function_call_output": {"call_id": (..., TEXT), "output": (..., CONTENT)},
    "item_reference": {"id": (..., TEXT)},
}
OPTIONAL_TOOLS = ("namespace", "web_search")  # codex sends them to every model, and works without them
# An item of text: its list of parts, its one part, and the events of both the part and the text. Thinking is a summary,
# as all clients show that, and few show reasoning_text.
TEXT_ITEMS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "reasoning": ("summary", {"type": "summary_text"}, "reasoning_summary_part", "reasoning_summary_text"),
    "message": ("content", {"type": "output_text", "annotations": []}, "content_part", "output_text"),
}


class Responses(ChatCompletions):
    """POST /v1/responses, OpenAI's newer API: the body becomes a chat's, and the answer a list of items.

    Source: https://platform.openai.com/docs/api-reference/responses
    """

    part: ClassVar[Table] = {
        "type": (..., one_of(("input_text", "output_text", "text", "summary_text", "reasoning_text"))),
        "text": (..., TEXT),
    }
    limit_name, messages_name = "max_output_tokens", "input"
    example = '{"input": "Hello!"}'
    id_prefix = "resp_"
    close = Dialect.close

    def unknown(self, name: str, value: Any, table: Table, where: str) -> None:
        if table is RESPONSE and value not in RESPONSE_UNSUPPORTED.get(name, [value]):
            cure = STATELESS if name in ("previous_response_id", "conversation") else "leave it out"
            raise ApiError(400, f"{name} is not supported here: {cure}", name, "unsupported_parameter")
        super().unknown(name, value, table, where)

    def read(self, body: Any) -> list[Request]:
        sent = self.check(body, RESPONSE)
        sent["text"] = self.check(sent["text"], {"format": ({"type": "text"}, OBJECT)}, "text")
        chat = {name: value for name, value in body.items() if name not in RESPONSE}
        (request,) = super().read({**chat, **self.nested_fields(sent)})
        fields = request.fields
        self.response = {
            "id": fields["id"],
            "object": "response",
            "created_at": fields["created"],
            "model": self.server.model,
            "status": "in_progress",
            "output": [],
            **dict.fromkeys(("error", "incomplete_details", "usage")),
            **{name: value for name, value in sent.items() if name not in ("input", "include")},
            **{name: fields[name] for name in ("parallel_tool_calls", "temperature", "top_p")},
        }
        self.item: dict[str, Any] = {}  # of the output, if it is not complete
        self.place: dict[str, Any] = {}  # of this item, as events give it
        self.numbers = itertools.count()  # of events
        return [request]

    def nested_fields(self, sent: dict[str, Any]) -> dict[str, Any]:
        """Chat's fields for those of RESPONSE. Raises ApiError."""
        form, choice, tools = sent["text"]["format"], sent["tool_choice"], []
        named: Table = {"type": (..., TYPE), "name": (..., NONEMPTY)}
        for i, tool in enumerate(sent["tools"]):
            if isinstance(tool, dict) and tool.get("type") in OPTIONAL_TOOLS:
                logger.debug("tools[%d] is left out: its type is %s", i, tool["type"])
            else:
                tools.append(self.nested(tool, "function", {"type": (..., TYPE), **FUNCTION}, f"tools[{i}]"))
        schema = (... if form.get("type") == "json_schema" else None, OBJECT)
        table: Table = {"type": RESPONSE_FORMAT["type"], "schema": schema}
        return {
            "messages": self.messages(sent["instructions"], sent["input"]),
            "max_completion_tokens": sent["max_output_tokens"],
            "tools": tools,
            "tool_choice": choice if isinstance(choice, str) else self.nested(choice, "function", named, "tool_choice"),
            "response_format": self.nested(form, "json_schema", table, "text.format"),
        }

    def nested(self, value: Any, name: str, table: Table, where: str) -> dict[str, Any]:
        """Chat's form of an object: all but its type stands one level deeper, as `name`. Raises ApiError."""
        self.check(value, table, where)
        return {"type": value["type"], name: {k: v for k, v in value.items() if k != "type" and v is not None}}

    def messages(self, instructions: str | None, items: Any) -> list[Message]:
        """The messages of a chat: one for the items of a role in a row, as some templates want it. Raises ApiError."""
        items = items if isinstance(items, list) else [{"role": "user", "content": items}]
        chat: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
        for i, item in enumerate(items):
            message, last = self.message(item, f"input[{i}]"), chat[-1] if chat else {}
            if message["role"] == "tool" or message["role"] != last.get("role"):
                chat.append(message)
                continue
            for name in ("content", "reasoning_content"):
                last[name] = "\n\n".join(text for text in (last.get(name), message.get(name)) if text)
            last["tool_calls"] = last.get("tool_calls", []) + message.get("tool_calls", [])
        return chat

    def message(self, item: Any, where: str) -> Message:
        """An item as a message of a chat. Raises ApiError."""
        kind = self.check(item, {"type": ("message", one_of(ITEMS))}, where)["type"]
        fields = self.check(item, ITEMS[kind], where)
        if kind == "item_reference" and not fields["id"].startswith("reasoning_"):
            sdk = "the AI SDK does with providerOptions: {openai: {store: false}}"
            raise ApiError(400, f"{where} is an item_reference: {STATELESS} ({sdk})", where, "unsupported_parameter")
        text = {name: self.text(fields.get(name, ""), f"{where}.{name}") for name in ("content", "summary", "output")}
        if kind == "message":
            return {"role": self.roles[fields["role"]][0], "content": text["content"]}
        if kind in ("reasoning", "item_reference"):  # the AI SDK only refers to earlier thinking, which can be missing
            return {"role": "assistant", "content": "", "reasoning_content": text["content"] or text["summary"]}
        if kind == "function_call":
            return {"role": "assistant", "content": "", "tool_calls": [{"id": fields["call_id"], "function": fields}]}
        return {"role": "tool", "tool_call_id": fields["call_id"], "content": text["output"]}

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        (request,) = requests
        self.piece(request, Piece(request.thinking, request.answer, request.calls))
        self.end(request)
        return self.response

    def begin(self, requests: Sequence[Request]) -> bytes:
        return self._event("created", response=self.response) + self._event("in_progress", response=self.response)

    def piece(self, request: Request, piece: Piece) -> bytes:
        data = self._say("reasoning", piece.thinking) + self._say("message", piece.text)
        return data + b"".join(map(self._call_item, piece.calls))

    def end(self, request: Request) -> bytes:
        cut = request.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        data = self._close_item(status)
        self.response |= {"status": status, "incomplete_details": {"reason": "max_output_tokens"} if cut else None}
        prompt, count = len(request.prompt), request.count
        thinking = min(count, len(self.server.tokenizer.encode_text(request.thinking)))
        self.response["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": request.cached},
            "output_tokens": count,
            "output_tokens_details": {"reasoning_tokens": thinking},
            "total_tokens": prompt + count,
        }
        return data + self._event(status, response=self.response)

    def broken(self, error: ApiError) -> bytes:
        # OpenAI's own clients raise the first as an exception. codex knows only the second.
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        top = {"code": error.code or "server_error", "message": str(error), "param": error.param}
        return self._event("error", **self.error(error), **top) + self._event("failed", response=self.response)

    def _say(self, kind: str, text: str) -> bytes:
        """The events of text in the open item, if it is of this kind, or else in a new one."""
        if not text:
            return b""
        data, (parts, part, part_event, text_event) = b"", TEXT_ITEMS[kind]
        if self.item.get("type") != kind:
            role = {"role": "assistant"} if kind == "message" else {}
            data = self._open_item(kind, **role, **{parts: []})
            self.place[f"{parts}_index"] = 0
            self.item[parts] = [{**part, "text": ""}]
            data += self._event(f"{part_event}.added", **self.place, part=self.item[parts][0])
        self.item[parts][0]["text"] += text
        return data + self._event(f"{text_event}.delta", **self.place, delta=text, logprobs=[])

    def _call_item(self, call: Call) -> bytes:
        """The events of a tool call."""
        data = self._open_item("function_call", call_id=call.id, name=call.name, arguments="")
        self.item["arguments"] = call.arguments
        data += self._event("function_call_arguments.delta", **self.place, delta=call.arguments)
        return data + self._close_item()

    def _open_item(self, kind: str, **more: Any) -> bytes:
        data, output = self._close_item(), self.response["output"]
        self.item = {"type": kind, "id": f"{kind}_{uuid.uuid4().hex}", "status": "in_progress", **more}
        self.place = {"output_index": len(output), "item_id": self.item["id"]}
        output.append(self.item)
        return data + self._event("output_item.added", output_index=len(output) - 1, item=self.item)

    def _close_item(self, status: str = "completed") -> bytes:
        item, self.item = self.item, {}
        if not item:
            return b""
        item["status"] = status
        if "arguments" in item:
            data = self._event("function_call_arguments.done", **self.place, arguments=item["arguments"])
        else:
            parts, _, part_event, text_event = TEXT_ITEMS[item["type"]]
            (part,) = item[parts]
            data = self._event(f"{text_event}.done", **self.place, text=part["text"], logprobs=[])
            data += self._event(f"{part_event}.done", **self.place, part=part)
        return data + self._event("output_item.done", output_index=self.place["output_index"], item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        kind = kind if kind == "error" else f"response.{kind}"
        return f"event: {kind}\n".encode() + self.line({"type": kind, "sequence_number": next(self.numbers), **fields})


def json_object(text: str) -> dict[str, Any] | None:
    """The object in a text of JSON; None if there is none. No text counts as an empty object."""
    with contextlib.suppress(ValueError):
        value = json.loads(text or "{}")
        return value if isinstance(value, dict) else None
    return None


def short_id(identity: str) -> str:
    """The id of a tool call in nine letters or digits, as Mistral's templates want it."""
    return re.sub("[^0-9A-Za-z]", "", identity)[-9:].rjust(9, "0")


def check_model(name: str, served: str) -> None:
    """Raise ApiError unless `name` is the served model's. Either may be NAME or OWNER/NAME."""
    if name.rpartition("/")[2] != served.rpartition("/")[2]:
        message = f"there is no model {printable(name)} here: leave the model out, or ask for {served}"
        raise ApiError(404, message, "model", "model_not_found")


def to_json(value: dict[str, Any]) -> bytes:
    """`value` as one line of JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace") + b"\n"


# ======================================================================================================================
# Page
# ======================================================================================================================

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
pre button { float: right; padding: 0 .5rem; font-size: .8rem; }
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
<template><article><h2 class="user"></h2><div class="assistant"></div><small></small></article></template>
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
const BLOCK = /^```[^]*?(?:\n```[ \t]*(?:\n|$(?![^]))|$(?![^]))|[^]+?(?:\n\n+|(?=^```)|$(?![^]))/gm

function make(tag, className, ...content) {
  const element = Object.assign(document.createElement(tag), {className})
  element.append(...content)
  return element
}

function styled(line) {
  const marked = (part) => part[0] === "*" ? make("b", "", part.slice(2, -2)) : make("code", "", part.slice(1, -1))
  return line.split(/(\*\*[^*\n]+\*\*|`[^`\n]+`)/).map((part, i) => i % 2 ? marked(part) : part)
}

function block(source) {
  if (source.startsWith("```")) {
    const code = make("code", "", source.replace(/^.*\n?/, "").replace(/\n?```[ \t]*\n?$/, ""))
    const copy = make("button", "", "Copy")
    // The clipboard is for pages from localhost or with TLS; elsewhere the code is selected, to be copied by hand.
    copy.onclick = () => navigator.clipboard?.writeText(code.textContent) ?? getSelection().selectAllChildren(code)
    return make("pre", "", copy, code)
  }
  return make("span", "", ...source.split(/(?<=\n)/).flatMap((line) => {
    const [, title] = line.match(/^#{1,6} +([^]*)/) || []
    return title ? make("span", "title", ...styled(title)) : styled(line.replace(/^( *)[-*] +/, "$1• "))
  }))
}

function show(element, text) {  // makes only the blocks that have changed
  for (const [i, source] of text.match(BLOCK).entries()) {
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
  const last = await receive(assistant).catch(() => ({}))  // the reader stopped it, or the connection broke
  if (last.done) {
    note.textContent = `${last.tokens_per_second} tokens/s · first token after ${last.time_to_first_token_seconds} s`
    if (last.finish_reason === "length") note.prepend(`Cut off at the limit of ${last.tokens_generated} tokens · `)
  } else if (request.signal.aborted) {
    note.textContent = "Stopped"
  } else {
    turn.className = "failed"
    note.textContent = "Failed: " + (last.error || "the connection to the server broke")
    input.value = [question, input.value].filter(Boolean).join("\n")  // to send it again
  }
  request = null
  render()
}

async function receive(assistant) {  // shows the answer as it arrives; returns the last line: the figures, or an error
  const shown = document.querySelectorAll("article:not(.failed) > :is(h2, div)")  // the last is the answer to come
  const said = (part) => ({role: part.className, content: part.text ?? part.textContent})
  const messages = [...shown].slice(0, -1).map(said)
  const response = await fetch("/chat", {
    method: "POST", headers: {"Content-Type": "application/json"}, signal: request.signal,
    body: JSON.stringify({  // an empty number is NaN, in JSON null: the server's default
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
      if (last.thinking && !last.done) assistant.nextElementSibling.textContent = "Thinking"
      if (last.response && !last.done) show(assistant, assistant.text = (assistant.text || "") + last.response)
    }
  }
  return last
}

document.onkeydown = (event) => {
  if (event.isComposing || event.keyCode === 229) return  // belongs to an input method; Safari sets only keyCode
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


# ======================================================================================================================
# HTTP
# ======================================================================================================================

T = TypeVar("T")
MAX_BODY = 2 << 20  # bytes: several times the longest context


class ApiHandler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own. http.server parses the requests; this class routes and answers them."""

    server: ApiServer
    protocol_version = default_request_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer on a kept connection can wait 40 ms for an acknowledgement
    wbufsize = -1  # buffered: an answer, or a piece of a stream, leaves in one write

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.patience + 1)  # of each read and write; a deadline comes first
        self.deadline = math.inf  # by when a whole header or body must be here; the sweep enforces it
        self.late = False  # the deadline has passed
        self.waiting: list[Request] = []  # the requests that are being answered
        self.refused = len(self.server.handlers) >= self.server.max_connections
        self.server.handlers.add(self)

    def handle_one_request(self) -> None:
        """Wait for a request, answer it and log it."""
        self.command = self.path = self.endpoint = self.route = self.outcome = ""
        self.headers, self.request_version, self.dialect = self.MessageClass(), "HTTP/1.1", Dialect(self.server)
        self.status, self.unread = 0, self.refused
        self.deadline = time.monotonic() + self.server.patience
        try:
            self.answer()
        except OSError:
            self.hang_up()
        if self.status:
            route = self.route if self.route in ROUTES else "other"  # or clients could add any number of counters
            self.server.responses[route, self.status] += 1
            level = logging.DEBUG if self.command in ("GET", "HEAD") and self.status in (200, 503) else logging.INFO
            logger.log(
                level, "%s %s %s%s", printable(self.command), printable(self.endpoint), self.status, self.outcome
            )

    def answer(self) -> None:
        """Answer one request, or send an error. Raises OSError if the client has left."""
        try:
            if self.refused:
                raise ApiError(503, "too many connections are open: try again in a moment")
            if self.read_header():
                self.check_site()
                self.check_key()
                self.respond(self.read_body())
        except ApiError as error:
            self.send_api_error(error)
        except OSError:
            raise
        except Exception:
            logger.exception("an error in the server on %s", printable(self.path))
            self.send_api_error(ApiError(500, "the server failed on this request: its log says why"))

    def read_header(self) -> bool:
        """Read the header and find the endpoint; False if the client sends no more. Raises ApiError."""
        self.raw_requestline = self.rfile.readline(65537)
        if len(self.raw_requestline) > 65536:
            self.send_error(414)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return False
        self.deadline = math.inf
        with contextlib.suppress(ValueError):
            self.endpoint = urllib.parse.urlsplit(self.path).path.rstrip("/") or "/"
        self.route = "/v1/models/NAME" if self.endpoint.startswith("/v1/models/") else self.endpoint
        if self.endpoint.startswith(("/v1", "/tokenize", "/detokenize")):
            own = {"/v1/completions": Completions, "/v1/responses": Responses}
            self.dialect = own.get(self.endpoint, ChatCompletions)(self.server)
        # Refuse a header that a proxy in front could understand differently (request smuggling).
        fields = [f"{name}: {value}".lower() for name, value in self.headers.items()]
        framing = " ".join(field for field in fields if field.startswith(("content-length:", "transfer-encoding:")))
        known = "|content-length: [0-9]{1,18}" + "|transfer-encoding: chunked" * (self.request_version != "HTTP/1.0")
        folded, hosts = "\n" in "".join(fields), sum(field.startswith("host:") for field in fields)
        malformed = self.headers.defects or folded or hosts > 1 or not re.fullmatch(known, framing) or not self.endpoint
        self.unread = bool(malformed) or framing not in ("", "content-length: 0")
        if malformed or self.late:
            rules = "one NAME: VALUE in each line, one Host, and one Content-Length or Transfer-Encoding: chunked"
            raise ApiError(400, f"the header is malformed: send a path, {rules}")
        return True

    def check_site(self) -> None:
        """Refuse pages of other sites by their Origin and, if only this machine may ask, by Host (DNS rebinding)."""
        host, origin, server = self.headers.get("Host"), self.headers.get("Origin"), self.server
        if host and server.on_loopback and not server.api_key and kind_of_host(f"//{host}") != "loopback":
            raise ApiError(403, f"the Host {printable(host)} is not this machine: use localhost, or set an API key")
        if origin and not self.allowed(origin):
            name = printable(origin)
            raise ApiError(403, f"pages of {name} may not use this server: --allow-origin {name} lets them")

    def allowed(self, origin: str) -> bool:
        """Whether pages of this origin may use the server: this machine's, its own, and those of --allow-origin."""
        kind, named = kind_of_host(origin), self.server.allowed_origins
        # Another site can make its name lead here, so the server's own page needs an IP address in the URL, or the key.
        own = origin.partition("://")[2] == self.headers.get("Host") and (self.server.api_key or kind == "address")
        return bool(own) or kind == "loopback" or origin in named or "*" in named

    def check_key(self) -> None:
        """Require the API key, as a Bearer token or as a Basic password, for which a browser asks its user."""
        key = self.server.api_key
        if key is None or self.endpoint == "/health" or self.command == "OPTIONS":
            return
        kind, _, credentials = self.headers.get("Authorization", "").partition(" ")
        given = credentials.strip().encode("latin-1")
        if kind.lower() == "basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given, validate=True).partition(b":")[2]
        if kind.lower() not in ("bearer", "basic") or not hmac.compare_digest(given, key.encode()):
            message = "the API key is missing or wrong: send it with -H 'Authorization: Bearer KEY'"
            challenge = {"WWW-Authenticate": 'Basic realm="tt_api_server", charset="UTF-8"'}
            raise ApiError(401, message, code="invalid_api_key", **challenge)

    def read_body(self) -> bytes:
        """Read the whole body, even of a request that is refused afterwards, so that the connection can go on."""
        self.wfile.flush()  # http.server's 100 Continue
        self.deadline = time.monotonic() + self.server.patience
        length, body = int(self.headers.get("Content-Length", 0)), bytearray()
        for size in self.chunk_sizes() if "Transfer-Encoding" in self.headers else [length]:
            if len(body) + size > MAX_BODY:
                raise ApiError(413, f"the body has more than {MAX_BODY} bytes: send less")
            body += self.rfile.read(size)
        if len(body) < length:
            raise ApiError(400, f"the body ends after {len(body)} of {length} bytes: send all of it")
        self.deadline, self.unread = math.inf, False
        return bytes(body)

    def chunk_sizes(self) -> Iterator[int]:
        """Yield the size of each chunk, which the caller then reads (RFC 9112, 7.1). Ignores trailer fields."""
        malformed, size = ApiError(400, "the chunked body is malformed: send it with a Content-Length"), -1
        while size:
            head = re.fullmatch(rb"([0-9a-fA-F]{1,8})[ \t]*(;[^\r\n]*)?\r\n", self.rfile.readline(1024))
            if not head:
                raise malformed
            yield (size := int(head[1], 16))
            while (line := self.rfile.readline(1024)) != b"\r\n":
                if size or not line.endswith(b"\n"):  # only the last chunk has lines after it, the trailer
                    raise malformed

    def respond(self, body: bytes) -> None:
        """Call the endpoint. Raises ApiError if there is none, or for a wrong method."""
        if self.route not in ROUTES:
            near = difflib.get_close_matches(self.endpoint, ROUTES, 1, 0.7)
            known = ", ".join(f"{method} {path}" for path, (method, _) in ROUTES.items())
            hint = f"did you mean {near[0]}?" if near else f"the endpoints are {known}"
            raise ApiError(404, f"there is no {printable(self.endpoint)} here: {hint}")
        method, endpoint = ROUTES[self.route]
        allowed = "OPTIONS, GET, HEAD" if method == "GET" else f"OPTIONS, {method}"
        if self.command == "OPTIONS":
            # The wildcard does not cover Authorization.
            self.send(204, b"", **{"Allow": allowed, "Access-Control-Allow-Headers": "Content-Type, Authorization, *"})
        elif self.command not in allowed.split(", "):
            raise ApiError(405, f"{self.endpoint} takes {method}, not {self.command}", Allow=allowed)
        else:
            endpoint(self, body)

    # The endpoints

    def page(self, body: bytes) -> None:
        self.send(200, PAGE.encode(), "text/html; charset=utf-8")

    def health(self, body: bytes) -> None:
        server, scheduler, state = self.server, self.server.scheduler, self.server.scheduler.state
        folder = server.folder if server.on_loopback and not server.api_key else Path(server.folder).name
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
            done = done and round(done, 2)
            report["progress"] = {"doing": doing, "done": done, "seconds": report["uptime_seconds"]}
        if state == "unhealthy":
            report["error"] = scheduler.error
        self.send(200 if state == "healthy" else 503, to_json(report))

    def metrics(self, body: bytes) -> None:
        """Metrics in Prometheus's format, under vLLM's names with tt_ for vllm:."""
        server, scheduler, statistics = self.server, self.server.scheduler, self.server.scheduler.statistics
        sums, model = statistics.sums, f"model_name={json.dumps(printable(server.model))}"
        outcomes = {f',finished_reason="{outcome}"': count for outcome, count in statistics.finished.items()}
        responses = {f',path="{p}",status="{s}"': count for (p, s), count in dict(server.responses).items()}
        families: dict[str, tuple[str, Mapping[str, float]]] = {  # a name to its help and its samples by label
            "num_requests_running": ("Requests in a slot.", {"": scheduler.busy}),
            "num_requests_waiting": ("Requests that wait for a slot.", {"": len(scheduler.queue)}),
            "slots": ("Requests that can run together.", {"": len(scheduler.slots)}),
            "http_connections": ("Open connections.", {"": len(server.handlers)}),
            "kv_cache_usage_perc": ("Part of the KV cache that is reserved; 1 is all.", {"": scheduler.kv_cache_use}),
            "requests_accepted_total": ("Requests that were queued.", {"": statistics.accepted}),
            "prompt_tokens_total": ("Prompt tokens of requests that got a token.", {"": sums["request_prompt_tokens"]}),
            "prefix_cache_queries_total": ("The same, under vLLM's other name.", {"": sums["request_prompt_tokens"]}),
            "prefix_cache_hits_total": ("Those that the KV cache had already.", {"": statistics.cached_tokens}),
            "generation_tokens_total": ("Tokens generated.", {"": sums["request_generation_tokens"]}),
            "request_success_total": ("Requests that ended, by outcome.", outcomes),
            "http_responses_total": ("Answers by path and status; 499: the client left.", responses),
        }
        lines: list[str] = []
        for name, (what, samples) in families.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP tt_{name} {what}", f"# TYPE tt_{name} {kind}"]
            lines += [f"tt_{name}{{{model}{labels}}} {value}" for labels, value in samples.items()]
        for name, what in HISTOGRAMS.items():
            bounds = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
            counts = list(itertools.accumulate(statistics.counts[name]))
            lines += [f"# HELP tt_{name} {what}", f"# TYPE tt_{name} histogram"]
            lines += [f'tt_{name}_bucket{{{model},le="{bound}"}} {count}' for bound, count in zip(bounds, counts)]
            lines += [f"tt_{name}_sum{{{model}}} {sums[name]}", f"tt_{name}_count{{{model}}} {counts[-1]}"]
        text = "\n".join([*lines, ""])
        self.send(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def models(self, body: bytes) -> None:
        server, name = self.server, urllib.parse.unquote(self.endpoint[len("/v1/models/") :])
        server.scheduler.check_available()
        if name:
            check_model(name, server.model)
        model = {"id": server.model, "object": "model", "created": server.created, "owned_by": "tt_api_server"}
        model["max_model_len"] = server.scheduler.max_seq_len  # as vLLM calls it
        self.send(200, to_json(model if name else {"object": "list", "data": [model]}))

    def complete(self, body: bytes) -> None:
        """Generate text, in any dialect, streamed or not."""
        self.server.scheduler.check_available()
        requests = self.parse(body, self.dialect.read)
        self.server.scheduler.submit(*requests)
        self.waiting = requests  # from now on the sweep checks that the client is still there
        try:
            if requests[0].fields["stream"]:
                self.send_piece(self.dialect.begin(requests))
                for request, piece in self.pieces(requests):
                    self.send_piece(self.dialect.piece(request, piece) if piece else self.dialect.end(request))
                self.send_piece(self.dialect.close(requests), last=True)
            else:
                for _ in self.pieces(requests):
                    pass  # until each request.answer is complete
                self.send(200, to_json(self.dialect.whole(requests)))
        finally:
            self.waiting = []
            for request in requests:
                self.server.scheduler.cancel(request, request.finish_reason or "cancelled")
            prompt, count = sum(len(request.prompt) for request in requests), sum(request.count for request in requests)
            first = requests[0].figures()["time_to_first_token_seconds"]
            speed = round(count / max(1e-9, *(request.seconds for request in requests)), 1)
            self.outcome = f" prompt={prompt} generated={count} first={first}s {speed} tokens/s"

    def pieces(self, requests: list[Request]) -> Iterator[tuple[Request, Piece | None]]:
        """Yield the pieces of each request's answer as they come, and None at its end."""
        several = len(requests) > 1
        running = {request: request.pieces(0.0 if several else STREAM_PAUSE) for request in requests}
        while running:
            for request, pieces in list(running.items()):
                if len(running) > 1 and request.tokens.empty() and not request.ended.is_set():
                    continue  # do not wait for one while others have text
                piece = next(pieces, None)
                if piece is None:
                    del running[request]
                    self.server.scheduler.cancel(request, request.finish_reason)  # it may run on after a stop string
                yield request, piece
            if several:
                time.sleep(STREAM_PAUSE)  # once for all of them

    def tokenize(self, body: bytes) -> None:
        dialect = ChatCompletions(self.server)
        self.server.scheduler.check_available()
        read = dialect.tokenize if self.endpoint == "/tokenize" else dialect.detokenize
        self.send(200, to_json(self.parse(body, read)))

    def parse(self, body: bytes, read: Callable[[Any], T]) -> T:
        """Read a JSON body. Raises ApiError."""
        if self.headers.get_content_type() != "application/json" or "Content-Encoding" in self.headers:
            raise ApiError(415, "the body must be uncompressed JSON: send it with -H 'Content-Type: application/json'")
        logger.debug("%s", printable(body.decode(errors="replace")))
        try:
            with self.server.parsing:
                return read(json.loads(body))
        except (ValueError, RecursionError) as error:  # RecursionError: it is nested too deeply
            raise ApiError(400, f"the body is not valid JSON ({error}): send {self.dialect.example}") from error

    # Answers

    def send(self, status: int, body: bytes, content_type: str = "application/json", **headers: str) -> None:
        """Send a whole answer."""
        if status != 204:
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
            self.close_connection = self.close_connection or not chunked
            framing = {"Transfer-Encoding": "chunked"} if chunked else {}
            self.send_head(200, {"Content-Type": self.dialect.content_type, "Cache-Control": "no-cache", **framing})
        if chunked:
            data = (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + (b"0\r\n\r\n" if last else b"")
        self.wfile.write(data)
        self.wfile.flush()

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        """Write the status line and the header."""
        self.status = status
        self.send_response_only(status)
        # The rest of an unread body would be taken for the next request. http.server acts on this header.
        connection = "close" if self.unread or self.close_connection else "keep-alive"
        headers |= {"Date": self.date_time_string(), "Connection": connection}
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
        if self.late:
            error = ApiError(408, "the request did not come in time: send it again")
        if self.status:
            self.send_piece(self.dialect.broken(error), last=True)
        else:
            self.send(error.status, to_json(self.dialect.error(error)), **error.headers)
        logger.debug("%s %s: %s", printable(self.command), printable(self.path), error)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> NoReturn:
        """http.server calls this for a first line or a header that it cannot parse."""
        self.unread = True
        too_long = "a line of the header has more than 65536 bytes, or the header has more than 100 fields: send less"
        raise ApiError(code, too_long if code in (414, 431) else f"send HTTP/1.1 without TLS: {printable(message)}")

    def hang_up(self) -> None:
        """The client has left or does not read: end the connection without waiting until it takes the rest."""
        self.close_connection = True
        if self.command:  # not between two requests
            self.status, self.outcome = 499, f"{self.outcome} the client has left"  # 499 is nginx's, for the log
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Close the connection. Unread input would reset it, and the client could lose the answer: drain it first."""
        self.deadline, self.late = time.monotonic() + 2, False
        with contextlib.suppress(OSError):
            super().finish()
            self.connection.shutdown(socket.SHUT_WR)
            while self.unread and not self.late and self.connection.recv(65536):
                pass
        self.server.handlers.discard(self)


ROUTES: dict[str, tuple[str, Callable[[ApiHandler, bytes], None]]] = {
    "/": ("GET", ApiHandler.page),
    "/health": ("GET", ApiHandler.health),
    "/metrics": ("GET", ApiHandler.metrics),
    "/chat": ("POST", ApiHandler.complete),
    "/v1/chat/completions": ("POST", ApiHandler.complete),
    "/v1/responses": ("POST", ApiHandler.complete),
    "/v1/completions": ("POST", ApiHandler.complete),
    "/v1/models": ("GET", ApiHandler.models),
    "/tokenize": ("POST", ApiHandler.tokenize),
    "/detokenize": ("POST", ApiHandler.tokenize),
    "/v1/models/NAME": ("GET", ApiHandler.models),
}


def kind_of_host(url: str) -> str:
    """What the host of a URL, or of //host:port, is: "loopback" (this machine only), another "address", or a "name"."""
    with contextlib.suppress(ValueError):
        host = urllib.parse.urlsplit(url).hostname or ""
        if host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback:
            return "loopback"
        return "address"
    return "name"


def hung_up(connection: socket.socket) -> bool:
    """Whether the client has closed the connection, or its sending side. Never waits."""
    poll = select.poll()
    try:
        poll.register(connection, select.POLLIN | getattr(select, "POLLRDHUP", 0))  # Linux sees it behind unread input
        events = sum(event for _, event in poll.poll(0))
        return events > select.POLLIN or (events > 0 and not connection.recv(1, socket.MSG_PEEK))
    except (OSError, ValueError):  # this side has closed it
        return True


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
    allow_reuse_port = False  # from Python 3.14 on http.server sets it, and two servers could share a port unnoticed
    server_bind = socketserver.TCPServer.server_bind  # http.server's looks up this machine's name, for seconds

    def __init__(self, host: str, port: int, patience: float = 60.0) -> None:
        """`patience`: seconds that a client may take for a header, for a body, for each write, and between requests."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), ApiHandler)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.patience = patience
        self.on_loopback = kind_of_host(f"//[{host}]" if ":" in host else f"//{host}") == "loopback"
        self.scheduler: Scheduler
        self.tokenizer: Tokenizer
        self.model = self.folder = self.note = ""
        self.api_key: str | None = None
        self.allowed_origins: list[str] = []
        self.max_connections = 512
        self.cut_short = False  # a stop has cancelled requests
        self.created, self.started = int(time.time()), time.monotonic()
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status
        self.parsing = threading.Semaphore(2)  # more threads that parse JSON and text at once would delay /health
        self.handlers: set[ApiHandler] = set()  # one for each open connection
        # Answered without a thread, since the last sweep and before it. They stay open for a while:
        # closing a connection whose client still sends would reset it before the answer is read.
        self.leaving: list[socket.socket] = []
        self.left: list[socket.socket] = []
        self._next_sweep = self._next_line = 0.0

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread. If the system gives none, answer here, without waiting."""
        try:
            super().process_request(request, client_address)
        except (RuntimeError, MemoryError):  # can't start new thread
            self.responses["other", 503] += 1
            cure = "raise its limit (ulimit -u, or a container's pids)"
            self.log_rarely(f"connections get 503, as the system gives no more threads: {cure}")
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(NO_THREAD)
                request.shutdown(socket.SHUT_WR)
            self.leaving.append(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log it. socketserver's own prints a traceback, and waits where nobody reads it."""
        self.log_rarely(f"a connection failed: {sys.exc_info()[1]!r}")

    def log_rarely(self, problem: str) -> None:
        """Log what could happen with each connection, once a minute at most."""
        if time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + 60
            logger.error(problem)

    def service_actions(self) -> None:
        """Sweep twice a second: end waits that are over their deadline, and answers whose client has left."""
        now = time.monotonic()
        if now < self._next_sweep:
            return
        for connection in self.left:
            connection.close()
        self.leaving, self.left = [], self.leaving
        for handler in list(self.handlers):
            if handler.deadline < now:
                handler.late, handler.deadline = True, math.inf
                with contextlib.suppress(OSError):
                    handler.connection.shutdown(socket.SHUT_RD)  # the handler's read returns
            if (requests := handler.waiting) and hung_up(handler.connection):
                with contextlib.suppress(OSError):
                    handler.connection.shutdown(socket.SHUT_RDWR)  # the handler's next write fails
                for request in requests:
                    self.scheduler.cancel(request)
        self._next_sweep = time.monotonic() + 0.5

    @property
    def under_way(self) -> int:
        """Requests whose answer is not delivered yet."""
        return sum(bool(handler.waiting) for handler in list(self.handlers))


# ======================================================================================================================
# CLI
# ======================================================================================================================

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DRAIN_SECONDS = 60  # time for the requests under way when the server is asked to stop
DEFAULT_MAX_SEQ_LEN = 8192

terminal = logging.getLogger("terminal")  # for the banner and the progress of the load


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An option's type: a whole number from low to high."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return parse


def origin(text: str) -> str:
    """An option's type: a site as browsers and apps name it in the header Origin."""
    if not (match := re.fullmatch(r"(\*|null|[A-Za-z][\w+.-]*://[^/\s]*)/?", text)):
        raise argparse.ArgumentTypeError(f"must be *, null, or scheme and host as in https://app.example, not {text!r}")
    return match[1]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; end the program if it is wrong."""
    about = (__doc__ or "").partition("\nThe rooms of this file")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--verbose", action="store_true", help="log prompts, refusals, requests to /health, and what ttnn logs")
    add("--version", action="version", version=f"tt_api_server {__version__}")
    add = parser.add_argument_group("model").add_argument
    count = whole_number(1, 1024)
    add("--model", metavar="DIR", help="or OWNER/NAME in Hugging Face's cache (default: $HF_MODEL, $LLAMA_DIR, a demo)")
    add("--served-model-name", metavar="NAME", help="the model's name in /v1 (default: its folder's)")
    add("--device", choices=("auto", "tt", "cpu"), default="auto", help="auto: the card if there is one, else the CPU")
    add("--max-batch-size", type=count, default=32, metavar="N", help="requests that run together (default: 32)")
    add("--max-seq-len", type=whole_number(32, 10**6), metavar="N", help="tokens of prompt and answer (default: 8192)")
    add("--max-queue", type=whole_number(0, 10**6), default=256, metavar="N", help="requests that wait (default: 256)")
    add = parser.add_argument_group("network").add_argument
    add("--port", type=whole_number(0, 65535), default=8080, help="0 is any free port (default: 8080)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, only this machine)")
    add("--api-key", metavar="KEY", default=os.environ.get("TT_API_KEY"), help="better in $TT_API_KEY: `ps` shows this")
    add("--allow-origin", action="append", type=origin, default=[], metavar="URL", help="pages that may ask; * is any")
    add = parser.add_argument_group("card (MESH_DEVICE: the board, TT_METAL_HOME: the tt-metal checkout)").add_argument
    add("--accuracy", action="store_true", help="tt-metal's settings for accuracy instead of performance")
    add("--data-parallel", type=whole_number(1, 32), default=1, metavar="N", help="copies of the model (default: 1)")
    add("--no-trace", action="store_true", help="run without traces, for debugging; slower")
    add("--trace-region-size", type=whole_number(1, 10**9 - 1), default=0, metavar="N", help="bytes for traces")
    add = parser.add_argument_group("CPU").add_argument
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="arithmetic; auto is the fastest")
    add("--threads", type=count, default=0, metavar="N", help="default: all cores, or one for a tiny model")
    return parser.parse_args(arguments)


def bind(options: argparse.Namespace) -> ApiServer:
    """Listen, before anything is loaded. Raises UserError if the address or the port is not available."""
    if not options.host or options.api_key == "":  # an empty host means all addresses; an empty key would mean no key
        raise UserError("--host, --api-key or TT_API_KEY is empty: give it a value, or leave it out")
    try:
        server = ApiServer(options.host, options.port)
    except OSError as error:
        problem = f"cannot listen on {options.host}, port {options.port} ({error.strerror or error})"
        raise UserError(f"{problem}: choose another --host or --port (0 is any free port)") from error
    server.api_key, server.allowed_origins = options.api_key, options.allow_origin
    # One connection, which is one open file, for each request that runs or waits, and some to spare.
    wanted = options.max_batch_size * options.data_parallel + options.max_queue + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below `hard`
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted + 128, hard)), hard))
    server.max_connections = max(min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128), 16)
    return server


def start_logging(verbose: bool) -> queue.Queue[Any]:
    """Write log and banner in a thread, so that a blocked terminal stops nothing; returns the lines still to write."""
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
    live, began, last_stage = sys.stderr is not None and sys.stderr.isatty(), time.monotonic(), ""

    def show(stage: str, done: float | None = None) -> None:
        nonlocal last_stage
        if live:
            bar = "" if done is None else f" [{'#' * round(30 * done):30}] {done:4.0%}"
            line = f"\r\x1b[K  {stage}{bar}  {time.monotonic() - began:.0f} s"  # \x1b[K clears the rest of the line
            terminal.info(line + "\n" * (stage == "ready"))
        elif stage != last_stage:
            terminal.info(f"  {stage}\n")
        last_stage = stage

    return show


def complete_options(options: argparse.Namespace, found: Checkpoint | None) -> None:
    """Set --device and --max-seq-len. Raises UserError if an option does not fit, or the card is missing."""
    longest = found.config.max_position if found else DEMO_CONFIG.max_position
    if (options.max_seq_len or 0) > longest:
        raise UserError(f"--max-seq-len is {options.max_seq_len}, and the model's limit is {longest}: lower it")
    options.max_seq_len = options.max_seq_len or min(longest, DEFAULT_MAX_SEQ_LEN)
    if options.device == "auto":
        options.device = "tt" if found and card_present() else "cpu"
    if options.device == "cpu":
        if options.accuracy or options.no_trace or options.trace_region_size or options.data_parallel > 1:
            card_options = "--accuracy, --data-parallel, --no-trace and --trace-region-size"
            raise UserError(f"{card_options} are for a card, and this model runs on the CPU: leave them out")
        return
    if not card_present():
        raise UserError("found no Tenstorrent card in /dev/tenstorrent: install its driver, or use --device cpu")
    if found is None:
        raise UserError("--device tt needs a model: add --model, as in --model ~/models/Llama-3.1-8B-Instruct")
    if options.dtype != "auto" or options.threads:
        raise UserError("--dtype and --threads are for the CPU, and this model runs on a card: leave them out")
    find_tt_metal()


def load(server: ApiServer, options: argparse.Namespace, found: Checkpoint | None, progress: Progress) -> Engine:
    """Load the tokenizer and the model. The scheduler's thread calls this."""
    progress("importing PyTorch")
    import_torch()
    checkpoint = found or demo_checkpoint(progress)
    server.folder = str(checkpoint.folder)
    progress("loading the tokenizer")
    server.tokenizer = open_tokenizer(checkpoint)
    size = (options.max_batch_size, options.max_seq_len, progress)
    if options.device == "cpu":
        return TorchEngine(checkpoint, *size, dtype=options.dtype, threads=options.threads)
    engine = TTEngine(
        checkpoint,
        *size,
        accuracy=options.accuracy,
        data_parallel=options.data_parallel,
        trace=not options.no_trace,
        trace_region_size=options.trace_region_size,
        verbose=options.verbose,
    )
    server.note = engine.note
    return engine


def announce(server: ApiServer, url: str) -> None:
    """Say that the model is loaded."""
    gc.freeze()  # a garbage collection of all loaded modules would stop all threads for 0.2 s, again and again
    endpoints = "\n".join(f"  {method:4} {url}{path}" for path, (method, _) in ROUTES.items())
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


def serve(options: argparse.Namespace) -> int:
    """Bind, load, serve, stop; returns the exit status."""
    server = bind(options)
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(server.server_name, server.server_name)
    url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}"
    found = find_checkpoint(options.model)
    complete_options(options, found)
    served = (found.name, str(found.folder), "") if found else (DEMO_NAME, "", DEMO_NOTE)
    server.model, server.folder, server.note = served
    server.model = options.served_model_name or server.model
    about = f"Model:  {server.model}, {server.folder or server.note}\nHealth: {url}/health, also during the load"
    terminal.info(f"Language model server on Tenstorrent\n{'=' * 60}\n{about}\n\n")
    if not server.on_loopback and not server.api_key:
        logger.warning("anyone who can reach this machine can use this server: set TT_API_KEY to require a key")
    scheduler = server.scheduler = Scheduler(options.max_queue)
    sys.setswitchinterval(0.0005)  # or each new connection may wait 5 ms for a thread that computes
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    threading.Thread(target=stop_on_signals, args=(server,), name="signals", daemon=True).start()
    if supervised := "NOTIFY_SOCKET" in os.environ:
        threading.Thread(target=exit_if_stuck, args=(scheduler,), name="watchdog", daemon=True).start()
    loading, ready = functools.partial(load, server, options, found), functools.partial(announce, server, url)
    scheduler.run(loading, progress_on_terminal(), ready)
    if scheduler.slots and not supervised:
        scheduler.wait_for_stop()  # if the engine has failed, /health reports it until the user stops the server
    while server.under_way and not server.cut_short:
        time.sleep(0.05)
    logger.info("Stopped.")
    return 1 if scheduler.error else 130 if server.cut_short else 0


def exit_if_stuck(scheduler: Scheduler) -> None:
    """End the process if a step hangs, so that systemd starts another one, which can reset the card."""
    while not scheduler.error:
        time.sleep(1)
    logger.error("%s", scheduler.error)
    time.sleep(10)  # if steps fail and do not hang, the main thread now closes the card and ends the process
    os._exit(1)


def stop_on_signals(server: ApiServer) -> None:
    """Stop at a signal, even if the main thread hangs. A second one, or DRAIN_SECONDS, cuts the requests short."""
    scheduler = server.scheduler
    signal.sigwait(STOP_SIGNALS)
    notify_systemd("STOPPING=1")
    if scheduler.state == "healthy":
        logger.info("Stopping. Requests under way: %d. Press CTRL+C again to cut them short.", server.under_way)
        scheduler.stop(drain=True)
        threading.Timer(DRAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()
        signal.sigwait(STOP_SIGNALS)
    logger.info("Stopping within 10 seconds.")
    server.cut_short = server.under_way > 0
    scheduler.stop(drain=False)
    time.sleep(10)
    os._exit(1 if scheduler.error else 130)


def notify_systemd(state: str) -> None:
    """Tell systemd the state, if it started this with Type=notify (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(state.encode(), re.sub("^@", "\0", address))
        except OSError as error:
            logger.warning("could not send %s to systemd at NOTIFY_SOCKET: %s", state, error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Exit status: 0 stopped, 1 the engine failed, 2 a UserError, 130 requests were cut short."""
    # Every thread inherits this and leaves the signals to stop_on_signals, which waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    options = parse_arguments(arguments)
    lines = start_logging(options.verbose)
    try:
        status = serve(options)
    except UserError as error:
        terminal.error(f"\nerror: {error}\n")
        status = 2
    deadline = time.monotonic() + 1
    while lines.unfinished_tasks and time.monotonic() < deadline:
        time.sleep(0.01)
    return status


if __name__ == "__main__":
    # Python's own exit would wait for threads, and ttnn would print pages about objects that still exist.
    os._exit(main())
