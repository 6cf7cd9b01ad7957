"""Write a shift as a control vector that llama.cpp loads.

1. The file is a GGUF of architecture `controlvector`, with one float32 tensor `direction.<N>` of the width of
   the residual. llama.cpp reads these tensors and no key of the header.
2. Its loader keeps `direction.N` in slot N − 1, and block L, counted from 0, adds slot L − 1 to its output:
   so `direction.N` is added to `resid_post.N`, and block 0 cannot be steered.
3. It is added at every token, those of the prompt and the first one included, times the scale on llama.cpp's
   command line. The strength of the handle is part of the vector, so that a scale of 1 means it.

Source: ggml-org/llama.cpp, `common_control_vector_load_one` (common/common.cpp) and
`llama_adapter_cvec::apply` (src/llama-adapter.cpp).
"""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter

from mechdiff.errors import HandleError
from mechdiff.files import whole
from mechdiff.handles.files import Handle

ARCHITECTURE = "controlvector"


def write_control_vector(path: str | Path, handle: Handle, hint: str) -> Path:
    """Write a handle as a control vector, whole or not at all.

    Args:
        path: Where to.
        handle: A shift of the residual, along one direction.
        hint: Architecture of the model, such as ``llama``.

    Raises:
        HandleError: If the handle is not a shift of the residual after a block from 1 on.
    """
    m, site, path = handle.manifest, handle.site, Path(path)
    if m.kind != "add" or m.k != 1:
        got = f"edit {m.kind} with k {m.k} is no fixed shift"
        raise HandleError(f"{got}, and a control vector is only added; allowed: add, k 1 (key: edit)")
    if site.component != "resid_post" or site.layer < 1:
        raise HandleError(f"llama.cpp cannot steer {site}; allowed: resid_post.1 and above (key: site)")
    shift = handle.change(torch.zeros(1, m.width))[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        writer = GGUFWriter(part, ARCHITECTURE)
        writer.add_name(f"{m.provenance.get('pair')} {site}")
        writer.add_description(f"mechdiff handle: add, {m.solver}, alpha {m.alpha}, for weights {m.weights}")
        writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
        writer.add_int32(f"{ARCHITECTURE}.layer_count", 1)
        writer.add_tensor(f"direction.{site.layer}", shift.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path
