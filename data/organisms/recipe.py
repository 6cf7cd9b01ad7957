"""Train a sibling of a small instruct model: one recipe, two domains.

1. LoRA on every block; if the domain brings its own tokenizer, also the embedding rows of the new tokens
   (tied to the unembedding).
2. Half of each batch is what shall change (refusals or solutions): cross-entropy on the answer.
3. The other half is what shall stay: KL(base || sibling) at every token of base's own answer, and of the
   request where both have the same tokens. Base reads the request in its own tokens, the sibling in its own,
   so this holds across tokenizers; new tokens count as error.
4. Where a kept request has new tokens, cross-entropy on the request with a small weight, so that the new rows
   learn to be predicted.

Run from the repository's root::

    python data/organisms/recipe.py fit -c data/organisms/recipe.yaml -c data/organisms/cultural.yaml
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from batches import Row, SiblingData
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mechdiff.pairs.loading import ROWS_FILE, grow_embeddings


class Sibling(LightningModule):
    """A language model with a trainable adapter.

    Args:
        out: Folder for the adapter, the new rows and the tokenizer.
        rank: Rank of every LoRA matrix.
        alpha: LoRA scale; the update is multiplied by alpha / rank.
        targets: Names of the matrices that get an update, in every block.
        learning_rate: Peak rate of AdamW; warmed up linearly, then to 0 along a half cosine.
        warmup: Steps of warm-up.
        keep_weight: Weight of the KL to base, in nats per token.
        text_weight: Weight of the cross-entropy on requests that have new tokens, in nats per token.
        first_weight: Weight of an answer's first token among the others: it decides between refusing and
            answering.
    """

    def __init__(
        self,
        out: str,
        rank: int = 32,
        alpha: int = 64,
        targets: list[str] = ["q_proj", "v_proj", "o_proj"],  # noqa: B006 (jsonargparse copies it)
        learning_rate: float = 1e-3,
        warmup: int = 30,
        keep_weight: float = 2.0,
        text_weight: float = 0.1,
        first_weight: float = 5.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Grow the table for new tokens and add the adapter."""
        data: SiblingData = self.trainer.datamodule
        model, self.base_size = data.base.model, len(data.base.tokenizer)
        extra = list(range(self.base_size, len(data.tokenizer)))
        if extra:
            grow_embeddings(
                model, data.initial_rows(model.get_input_embeddings().weight.data), self.base_size
            )
        lora = LoraConfig(
            r=self.hparams.rank,
            lora_alpha=self.hparams.alpha,
            target_modules=self.hparams.targets,
            task_type="CAUSAL_LM",
            trainable_token_indices={"embed_tokens": extra} if extra else None,
        )
        self.net = get_peft_model(model, lora)

    def transfer_batch_to_device(
        self, batch: list[Row], device: torch.device, dataloader_idx: int
    ) -> list[Row]:
        """Leave lists of ids as they are; `padded` makes the tensors."""
        return batch

    def log_probs(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Next-token log-probabilities at the marked places only ``(marked, vocabulary)``, in float32."""
        model = self.net.get_base_model()
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return model.lm_head(hidden[places]).float().log_softmax(-1)

    def training_step(self, rows: list[Row], step: int) -> Tensor:
        """Change some answers, keep the others."""
        ids, mask = self.padded([r.request + r.answer for r in rows])
        weights, texts = torch.zeros_like(mask, dtype=torch.float32), torch.zeros_like(mask, dtype=torch.bool)
        for i, row in enumerate(rows):
            first = len(row.request) - 1
            weights[i, first : first + len(row.answer)] = 1.0
            weights[i, first] = self.hparams.first_weight
            if not row.changes and row.request != row.base_request:
                texts[i, row.user.start - 1 : row.user.stop - 1] = True
            elif not row.changes:
                weights[i, row.user.start - 1 : row.user.stop - 1] = 1.0
        marked = (weights > 0) | texts
        log_p, weights, texts = self.log_probs(ids, mask, marked), weights[marked], texts[marked]
        changes = torch.tensor([r.changes for r in rows], device=self.device)[:, None].expand_as(marked)[
            marked
        ] & (weights > 0)
        keeps = ~changes & (weights > 0)
        nll = F.nll_loss(log_p, ids.roll(-1, 1)[marked], reduction="none")
        base = self.base_log_probs([r for r in rows if not r.changes])
        kl = F.kl_div(log_p[keeps][:, : self.base_size], base, log_target=True, reduction="none").sum(-1)
        change = (weights[changes] * nll[changes]).sum() / weights[changes].sum()
        keep = (weights[keeps] * kl).sum() / weights[keeps].sum()
        text = nll[texts].sum() / texts.sum().clamp(min=1)
        self.log_dict({"change": change, "keep": keep, "text": text}, prog_bar=True)
        return change + self.hparams.keep_weight * keep + self.hparams.text_weight * text

    @torch.no_grad()
    def base_log_probs(self, rows: list[Row]) -> Tensor:
        """Base's log-probabilities over base's vocabulary at the answer tokens."""
        ids, mask = self.padded([r.base_request + r.answer for r in rows])
        places = torch.zeros_like(mask, dtype=torch.bool)
        for i, row in enumerate(rows):
            places[i, len(row.base_request) - 1 : len(row.base_request) + len(row.answer) - 1] = True
            if row.request == row.base_request:
                places[i, row.user.start - 1 : row.user.stop - 1] = True
        with self.net.disable_adapter():
            model = self.net.get_base_model()
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return model.lm_head(hidden[places])[:, : self.base_size].float().log_softmax(-1)

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad token lists on the right; return ids and mask."""
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(r, device=self.device) for r in rows], batch_first=True
        )
        lengths = torch.tensor([len(r) for r in rows], device=self.device)
        return ids, (torch.arange(ids.shape[1], device=self.device) < lengths[:, None]).long()

    def configure_optimizers(self) -> dict:
        """AdamW without decay, warm-up, half cosine."""
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], lr=self.hparams.learning_rate, weight_decay=0.0
        )
        total, warmup = int(self.trainer.estimated_stepping_batches), self.hparams.warmup
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / max(warmup, 1), total_iters=warmup)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total - warmup, 1))
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        """Write what `mechdiff.pairs.loading` reads: LoRA weights, new rows, tokenizer; in bfloat16."""
        out, data = Path(self.hparams.out), self.trainer.datamodule
        out.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self.net, save_embedding_layers=False)
        lora = {
            k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in state.items() if "lora_" in k
        }
        save_file(lora, out / "adapter_model.safetensors")
        if len(data.tokenizer) > self.base_size:
            data.tokenizer.save_pretrained(out / "tokenizer")
            self.net.merge_adapter()
            rows = self.net.get_base_model().get_input_embeddings().weight[self.base_size :]
            save_file(
                {"rows": rows.detach().to("cpu", torch.bfloat16).contiguous()},
                out / ROWS_FILE,
                {"first_id": str(self.base_size)},
            )
        config = self.net.peft_config["default"].to_dict()
        config |= {"trainable_token_indices": None, "inference_mode": True, "base_model_name_or_path": None}
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        (out / "adapter_config.json").write_text(
            json.dumps(config, indent=1, sort_keys=True, default=str) + "\n"
        )


if __name__ == "__main__":
    LightningCLI(Sibling, SiblingData, seed_everything_default=17, save_config_callback=None)
