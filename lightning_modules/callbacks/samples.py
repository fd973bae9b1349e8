"""What the model writes, as training goes."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.callbacks import validates_a_fit


class SampleText(L.Callback):
    """Continues fixed prompts after each validation, in `samples.md` and as a W&B table.

    The same prompts and the same random numbers each time, so that what changes is the model.

    Args:
        prompts: Texts to continue.
        max_new_tokens: Length of a continuation, in tokens (at least 1).
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from this many likeliest tokens only; `null` for all.
        top_p: Draw from the fewest tokens that have this much probability together (0 to 1); `null` for all.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise MisconfigurationException("SampleText: prompts is empty; give at least one text to continue")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes a section of samples."""
        if not validates_a_fit(trainer):
            return
        continuations = [self.continue_prompt(trainer, pl_module, prompt) for prompt in self.prompts]
        path = Path(trainer.default_root_dir) / "samples.md"
        loss = trainer.callback_metrics.get("val/loss")
        with path.open("a", encoding="utf-8") as file:
            file.write(
                f"## Step {trainer.global_step}" + (f", val/loss {loss:.3f}" if loss is not None else "") + "\n\n"
            )
            for prompt, continuation in zip(self.prompts, continuations, strict=True):
                fence = "`" * (3 if "```" not in continuation else 8)
                file.write(f"**{prompt!r}**\n\n{fence}text\n{prompt}{continuation}\n{fence}\n\n")
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                rows = [[trainer.global_step, p, c] for p, c in zip(self.prompts, continuations, strict=True)]
                logger.log_table("samples", columns=["step", "prompt", "continuation"], data=rows)

    def continue_prompt(self, trainer: L.Trainer, pl_module: L.LightningModule, prompt: str) -> str:
        """One continuation, as text."""
        ids = trainer.datamodule.encode(prompt)[None].to(pl_module.device)  # (1, T)
        tokens = pl_module.generate(
            ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=torch.Generator(pl_module.device).manual_seed(self.seed),
        )
        return trainer.datamodule.tokenizer.decode([int(token) for token in tokens])
