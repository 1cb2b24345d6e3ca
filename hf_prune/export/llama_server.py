"""The process of `llama_cpp.py`: `python llama_server.py FILE CONTEXT THREADS` serves a file until its standard input ends.

It is run as text and imports nothing of this library, which would take longer than all else that it does.
"""

from __future__ import annotations

import sys


def main(file: str, context: str, threads: str) -> None:
    """Serve a file on the CPU, with keys and values in float32; say where, or why not."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = int(context), 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup, settings.verbosity = False, -1
    try:
        server = xllamacpp.Server(settings)
    except Exception as error:  # of many kinds
        print("failed:", " ".join(str(error).split()) or type(error).__name__, flush=True)
        return
    print("listens at", server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
