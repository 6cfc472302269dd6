"""Encoded arrays in the formats of other runtimes, and back: without changing a bit, or refused by name.

One format a file: `gguf` (llama.cpp), `onnx`, `int4pack` (torch's own 4-bit weights on the CPU) and `mx` (OCP MX). Each
has the same functions:

    pack(array, name)        a `BlockArray` in the format's own parts
    unpack(parts, name)      the `BlockArray` of such parts
    save(path, tensors)      a whole file of them (not for int4pack, which has no files)
    load(path)               its arrays, by name

Two modules write whole models: `gpt2` the GPT of `hbfp train` for llama.cpp, `onnx_network` linear layers in ONNX.

What a format can't hold exactly raises `hbfp.errors.ExportError`, which names the tensor, the block, what was expected
and what was found. Nothing is rounded. The packages that read and write files come with `pip install 'hbfp[export]'`.
"""
