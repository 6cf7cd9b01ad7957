"""What other tools do, each as its own documentation says; run by `benchmarks.peer`, one worker for each.

Nothing of this library is imported here but the clock. A way gets a job and returns a function that does the
work once and returns what it found, for comparison.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.turns import turn

Job = dict[str, Any]
Work = Callable[[], Any]
PER_BATCH = 8


def language_model(job: Job) -> Any:
    """Load a frozen model from a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model.eval().requires_grad_(False)


def batches(ids: Sequence[Sequence[int]], pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of 8 texts as they come, padded on the right, and their masks."""
    for start in range(0, len(ids), PER_BATCH):
        rows = [torch.tensor(row) for row in ids[start : start + PER_BATCH]]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        yield tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()


def to_hdf5(states: dict[int, list[Tensor]], path: Path) -> None:
    """Write states by layer, `(tokens, d_model)`, texts one after the other."""
    import h5py

    with h5py.File(path, "w") as file:
        for layer, parts in states.items():
            file[f"states/{layer}"] = torch.cat(parts).numpy()


def hidden_states(model: Any, job: Job, path: Path) -> None:
    """Keep layers by `output_hidden_states`, as transformers offers it."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in job["layers"]}
    with torch.no_grad():
        for tokens, mask in batches(job["ids"], job["pad"]):
            states = model(
                input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
            ).hidden_states
            for layer, parts in found.items():
                parts.append(states[layer + 1][mask.bool()])
    to_hdf5(found, path)


def nnsight(job: Job) -> Work:
    """Save the outputs of blocks in a trace; with ``stop`` the trace ends after the last of them."""
    import nnsight as tool
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = tool.TransformersModel(language_model(job), tokenizer=tokenizer, task="text-generation")

    def work() -> None:
        found: dict[int, list[Tensor]] = {layer: [] for layer in job["layers"]}
        layers = sorted(found)
        for tokens, mask in batches(job["ids"], job["pad"]):
            both = {"input_ids": tokens, "attention_mask": mask}
            with torch.no_grad(), model.trace(both) as tracer:
                saved = tool.save([model.model.layers[layer].output for layer in layers])
                if job["stop"]:
                    tracer.stop()
            for layer, states in zip(layers, saved, strict=True):
                found[layer].append(states[mask.bool()])
        to_hdf5(found, Path(job["path"]))

    return work


def transformer_lens(job: Job) -> Work:
    """Run with a cache of the wanted names; with ``stop`` up to the last of them."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = TransformerBridge.boot_transformers(
        str(job["model"]),
        hf_model=language_model(job),
        tokenizer=tokenizer,
        device="cpu",
        dtype=torch.float32,
    )
    names = {layer: f"blocks.{layer}.hook_out" for layer in job["layers"]}
    more = {"stop_at_layer": max(names) + 1} if job["stop"] else {}

    def work() -> None:
        found: dict[int, list[Tensor]] = {layer: [] for layer in names}
        for tokens, mask in batches(job["ids"], job["pad"]):
            with torch.no_grad():
                _, cache = model.run_with_cache(
                    tokens, attention_mask=mask, names_filter=list(names.values()), **more
                )
            for layer, name in names.items():
                found[layer].append(cache[name][mask.bool()])
        to_hdf5(found, Path(job["path"]))

    return work


def captum(job: Job) -> Work:
    """Integrate gradients at the input of every output projection, layer by layer."""
    from captum.attr import LayerIntegratedGradients

    model, ids = language_model(job), job["ids"]

    def score(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits[:, -1].log_softmax(-1)[:, job["answer"]]

    def work() -> Tensor:
        found = []
        for block in model.model.layers:
            tool = LayerIntegratedGradients(score, block.self_attn.o_proj)
            values = tool.attribute(
                ids,
                baselines=job["baseline"],
                n_steps=job["nodes"],
                method="gausslegendre",
                attribute_to_layer_input=True,
            )
            found.append(values.detach().unflatten(-1, (job["heads"], -1)).sum((1, 3)))
        return torch.stack(found, 1)  # (rows, layers, heads)

    return work


def lm_eval(job: Job) -> Work:
    """Score options as requests of a multiple-choice task are scored."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = HFLM(
        pretrained=language_model(job),
        tokenizer=tokenizer,
        backend="causal",
        device="cpu",
        batch_size=PER_BATCH,
        max_length=job["context"],
    )

    def work() -> Tensor:
        requests = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(job["pairs"])]
        scores = model.loglikelihood(requests, disable_tqdm=True)
        return torch.tensor([score for score, _ in scores], dtype=torch.float64)

    return work


def sklearn(job: Job) -> Work:
    """Fit RidgeCV layer by layer, and compare layers by CKA from Gram matrices.

    A part of the layers is done: the others cost as much.
    """
    import h5py
    import numpy as np
    from sklearn.linear_model import RidgeCV

    def read(side: str, layer: int) -> Any:
        with h5py.File(job["path"], "r") as file:
            return file[f"{side}/{layer}"][:].astype(np.float64)

    def gram(rows: Any) -> Any:
        kernel = rows @ rows.T
        means = kernel.mean(0)
        return kernel - means - means[:, None] + means.mean()

    def work() -> dict[str, Tensor]:
        every, some = job["layers"], job["some"]
        cka = torch.zeros(len(some), len(every), dtype=torch.float64)
        for i, a in enumerate(some):
            k = gram(read("source", a))
            size = np.linalg.norm(k)
            for j, b in enumerate(every):
                m = gram(read("target", b))
                cka[i, j] = float((k * m).sum() / (size * np.linalg.norm(m)))
        weights, chosen = [], []
        for layer in some:
            x, y = read("source", layer), read("target", layer)
            spread = x.var(0).mean() * len(x)
            fit = RidgeCV(alphas=[value * spread for value in job["lambdas"]]).fit(x, y)
            weights.append(torch.from_numpy(fit.coef_.T.copy()))
            chosen.append(float(fit.alpha_ / spread))
        return {"cka": cka, "weights": torch.stack(weights), "lambdas": torch.tensor(chosen)}

    return work


WAYS: dict[str, Callable[[Job], Work]] = {
    "nnsight": nnsight,
    "transformer_lens": transformer_lens,
    "captum": captum,
    "lm_eval": lm_eval,
    "sklearn": sklearn,
}
PACKAGES = {"nnsight": "nnsight", "transformer_lens": "transformer-lens", "captum": "captum"}
PACKAGES |= {"lm_eval": "lm_eval", "sklearn": "scikit-learn"}


def main(name: str, folder: Path) -> None:
    """Get ready, then do the work as often as asked; other output goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_grad_enabled(True)
    work = WAYS[name](torch.load(folder / "job.pt", weights_only=True))
    about = {"version": metadata.version(PACKAGES[name]), "torch": torch.__version__}
    print(json.dumps(about | {"threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        assert line.strip() == "run", line
        found: list[Any] = []
        took = turn(lambda found=found: found.append(work()))
        torch.save(found[0], folder / "result.pt")
        print(json.dumps(took._asdict()), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
