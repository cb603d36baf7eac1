"""llama.cpp's shared library through ctypes: a model, a context of one sequence, and quantizing a file.

Only the beginning of llama.cpp's parameter structures is named here; what follows keeps the library's defaults. A
structure whose defaults are not where they are expected is refused, because then the library is of another version.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Q4_0 = 2  # llama_ftype: 4 bits, blocks of 32, one float16 scale per block
_POLL = 50  # llama.cpp's default, of 0 (waiting threads sleep) to 100
_CPU = 0  # ggml_backend_dev_type
_REST = ("rest", ctypes.c_uint8 * 1024)  # more than any version has


class _ModelParams(Structure):
    _fields_ = (_REST,)


class _ContextParams(Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        _REST,
    )


class _QuantizeParams(Structure):
    _fields_ = (
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        _REST,
    )


class _ThreadpoolParams(Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
        _REST,
    )


class _Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    )


class _Symbol(Structure):
    """What dladdr tells of an address."""

    _fields_ = (("file", c_char_p), ("base", c_void_p), ("name", c_char_p), ("address", c_void_p))


_Log = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_P = c_void_p
_LLAMA: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_quantize_default_params": (_QuantizeParams, []),
    "llama_model_load_from_file": (_P, [c_char_p, _ModelParams]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_vocab_n_tokens": (c_int32, [_P]),
    "llama_init_from_model": (_P, [_P, _ContextParams]),
    "llama_n_ctx": (c_uint32, [_P]),
    "llama_n_ubatch": (c_uint32, [_P]),
    "llama_get_memory": (_P, [_P]),
    "llama_memory_seq_rm": (c_bool, [_P, c_int32, c_int32, c_int32]),
    "llama_set_n_threads": (None, [_P, c_int32, c_int32]),
    "llama_n_threads": (c_int32, [_P]),
    "llama_attach_threadpool": (None, [_P, _P, _P]),
    "llama_batch_get_one": (_Batch, [_P, c_int32]),
    "llama_decode": (c_int32, [_P, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [_P, c_int32]),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, _P]),
    "llama_version": (c_char_p, []),
    "llama_print_system_info": (c_char_p, []),
    "llama_log_set": (None, [_Log, _P]),
}
_GGML = {"ggml_backend_load_all_from_path": (None, [c_char_p]), "ggml_backend_dev_by_type": (_P, [c_int])}
_BASE = {
    "ggml_log_set": (None, [_Log, _P]),
    "ggml_threadpool_params_default": (_ThreadpoolParams, [c_int]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, c_char_p]),
}
_BACKEND = {"ggml_threadpool_new": (_P, [_P]), "ggml_threadpool_pause": (None, [_P])}


class LlamaLibrary:
    """The shared libraries of one directory, with the CPU backend that suits this processor best.

    Raises RuntimeError if they do not load or are of a version that is laid out otherwise.
    """

    def __init__(self, directory: Path):
        self._words = ""  # the library's last line
        self._log = _Log(self._hear)
        self._base = self._open(directory, "libggml-base.so", _BASE)
        self._ggml = self._open(directory, "libggml.*so", _GGML)
        self.llama = self._open(directory, "libllama.*so", _LLAMA)
        for set_log in (self._base.ggml_log_set, self.llama.llama_log_set):
            set_log(self._log, None)
        self._ggml.ggml_backend_load_all_from_path(str(directory).encode())
        self._device = self._need(self._ggml.ggml_backend_dev_by_type(_CPU), "no CPU backend loads")
        self._backend = self._cpu_backend()

    @property
    def version(self) -> str:
        return str(self.llama.llama_version().decode())

    @property
    def features(self) -> str:
        """The instruction sets that the loaded backend uses."""
        pairs = self.llama.llama_print_system_info().decode().partition(":")[2].split("|")
        return ", ".join(pair.split("=")[0].strip() for pair in pairs if pair.strip().endswith("= 1"))

    def quantize(self, source: Path, output: Path, kind: int) -> None:
        """Write every matrix of a GGUF file, the embedding included, in one quantization. Raises RuntimeError."""
        params = self.llama.llama_model_quantize_default_params()
        self._check(params.quantize_output_tensor and not params.allow_requantize and not params.pure)
        params.ftype, params.allow_requantize, params.pure = kind, True, True
        failed = self.llama.llama_model_quantize(str(source).encode(), str(output).encode(), byref(params))
        self._need(not failed, f"{source.name} could not be quantized")

    def threadpool(self, threads: int, *, poll: bool) -> int:
        """Return a pool of threads that waits for work awake for a while, as by default, or asleep."""
        params = self._base.ggml_threadpool_params_default(threads)
        self._check((params.n_threads, params.prio, params.poll) == (threads, 0, _POLL))
        params.poll = _POLL if poll else 0
        return int(self._need(self._backend.ggml_threadpool_new(byref(params)), "no thread pool"))

    def pause(self, pool: int) -> None:
        """Let a pool's threads sleep until the next tokens; without it they stay awake for some tenths of a second."""
        self._backend.ggml_threadpool_pause(pool)

    def _cpu_backend(self) -> Any:
        """Return the library of the CPU backend that was chosen."""
        reg = self._base.ggml_backend_dev_backend_reg(self._device)
        address = self._base.ggml_backend_reg_get_proc_address(reg, b"ggml_threadpool_new")
        found = _Symbol()
        ctypes.CDLL(None).dladdr(c_void_p(self._need(address, "the CPU backend makes no thread pool")), byref(found))
        file = Path(self._need(found.file, "the CPU backend is in no file").decode())
        return self._open(file.parent, file.name, _BACKEND)

    def _open(self, directory: Path, pattern: str, functions: dict[str, tuple[Any, list[Any]]]) -> Any:
        found = sorted(directory.glob(pattern))
        if len(found) != 1:
            raise RuntimeError(f"{directory} holds {len(found)} files {pattern} instead of 1")
        try:
            library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"llama.cpp does not load: {error}") from error
        return library

    def _hear(self, _level: int, text: bytes, _data: Any) -> None:
        self._words = text.decode(errors="replace").strip() or self._words

    def _need(self, value: Any, complaint: str) -> Any:
        if not value:
            raise RuntimeError(f"llama.cpp: {complaint}; its last words: {self._words}")
        return value

    def _check(self, expected: bool) -> None:
        if not expected:
            raise RuntimeError(f"llama.cpp {self.version} has other parameters than this benchmark knows")


class LlamaContext:
    """A model with a context for one sequence, which runs tokens and finds the likeliest next one.

    Raises RuntimeError, with llama.cpp's own words, when something fails.
    """

    def __init__(self, library: LlamaLibrary, weights: Path, threads: int, rows: int, batch: int, *, poll: bool):
        self._library, llama = library, library.llama
        need, check = library._need, library._check
        model = llama.llama_model_load_from_file(str(weights).encode(), llama.llama_model_default_params())
        self._model = need(model, f"{weights.name} does not load")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        params = llama.llama_context_default_params()
        check((params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max) == (512, 2048, 512, 1))
        params.n_ctx, params.n_batch, params.n_ubatch = rows, batch, batch
        self._context = need(llama.llama_init_from_model(self._model, params), "no context")
        check(llama.llama_n_ctx(self._context) >= rows and llama.llama_n_ubatch(self._context) == batch)
        self._pool = library.threadpool(threads, poll=poll)
        llama.llama_set_n_threads(self._context, threads, threads)
        llama.llama_attach_threadpool(self._context, self._pool, self._pool)
        check(llama.llama_n_threads(self._context) == threads)
        self._memory = llama.llama_get_memory(self._context)

    def cut(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        self._library._need(self.llama.llama_memory_seq_rm(self._memory, 0, length, -1), "tokens cannot be forgotten")

    def next(self, tokens: list[int]) -> int:
        """Run tokens after those that ran before, and return the likeliest next one."""
        given = (c_int32 * len(tokens))(*tokens)
        batch = self.llama.llama_batch_get_one(ctypes.addressof(given), len(tokens))
        failed = self.llama.llama_decode(self._context, batch)
        self._library._need(not failed, f"{len(tokens)} tokens failed")
        logits = self.llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Run tokens after those that ran before, at most a batch, and return all their logits (tokens, vocab)."""
        given, wanted = (c_int32 * len(tokens))(*tokens), (c_int8 * len(tokens))(*[1] * len(tokens))
        batch = self.llama.llama_batch_get_one(ctypes.addressof(given), len(tokens))
        batch.logits = ctypes.addressof(wanted)
        self._library._need(not self.llama.llama_decode(self._context, batch), f"{len(tokens)} tokens failed")
        rows = [self.llama.llama_get_logits_ith(self._context, at) for at in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (self._vocabulary,)) for row in rows])

    def rest(self) -> None:
        """Let waiting threads sleep until the next tokens, so as not to disturb what runs in between."""
        self._library.pause(self._pool)

    @property
    def llama(self) -> Any:
        return self._library.llama
