"""llama.cpp through llama-cpp-python: logits, ids, and what it does with a file; tests without it are skipped."""

import ctypes

import gguf
import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
SILENT = llama_cpp.llama_log_callback(lambda *_: None)


class Model:
    """A file opened by llama.cpp, with all of its caches in float32."""

    def __init__(self, path, vocab_only=False):
        llama_cpp.llama_log_set(SILENT, None)
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only, settings.use_mmap = vocab_only, False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp cannot load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        llama_cpp.llama_model_free(self.model)

    def logits(self, ids):
        """Logits [T, V] of one sequence."""
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = 2
        settings.type_k = settings.type_v = 0  # Float32.
        settings.flash_attn_type = 0
        context = llama_cpp.llama_init_from_model(self.model, settings)
        batch = llama_cpp.llama_batch_init(512, 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(context, batch) == 0
        shape = len(ids), llama_cpp.llama_vocab_n_tokens(self.vocab)
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape).copy()
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return found

    def ids(self, text):
        """The ids of a text, with bos if the file says so, and special tokens where their names stand."""
        data = text.encode()
        room = len(data) + 8
        found = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), found, room, True, True)
        assert count >= 0
        return found[:count]

    def template(self):
        found = llama_cpp.llama_model_chat_template(self.model, None)
        return None if found is None else found.decode()


def quantised(source, path, type, importance=None):
    """Writes a file with llama.cpp's own quantiser, which also dequantises to F32.

    Args:
      importance: mean squares by tensor.
    """
    llama_cpp.llama_log_set(SILENT, None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = gguf.LlamaFileType["ALL_F32" if type == "F32" else f"MOSTLY_{type}"]
    settings.allow_requantize = True
    if importance is not None:
        entry = llama_cpp.llama_model_imatrix_data
        rows = [entry(name.encode(), np.ascontiguousarray(x).ctypes.data_as(ctypes.POINTER(ctypes.c_float)), x.size)
                for name, x in importance.items()]
        settings.imatrix = (entry * (len(rows) + 1))(*rows, entry())
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings) == 0
    return path


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(expected, found):
    """The mean over tokens of KL(expected || found)."""
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())
