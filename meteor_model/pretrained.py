"""The border to transformers: loading that refuses another layout, attention kernels, initial values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from meteor_model.compat import CACHE_NAMES
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encoders import ENCODERS
from meteor_model.fusion import MeteorProjector

NAMED_TENSORS = 8  # of each kind in an error
README = """# A METEOR vision-language model

transformers alone does not know it: it needs the Python package `meteor_model`.

```python
import meteor_model.auto
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER").eval()
processor = AutoProcessor.from_pretrained("FOLDER")
```
"""


class CheckpointLayoutError(ValueError, RuntimeError):
    """A checkpoint whose tensors are not the model's. Transformers raises a RuntimeError for shapes."""


class MeteorPreTrainedModel(PreTrainedModel):
    """Loading, saving, attention kernels and initialisation."""

    config_class = MeteorConfig
    config: MeteorConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Stage 1 calls a tower's pieces one by one, so a tower stays whole; the LLM adds its layers to this list.
    _no_split_modules: ClassVar[list[str]] = sorted(
        {c.__name__ for c in ENCODERS.values()} | {MeteorProjector.__name__}
    )
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but a checkpoint must hold exactly the tensors of the model.

        Args:
            pretrained_model_name_or_path: folder or hub id; None with `config` and `state_dict`, which may be partial.
            model_args: as in transformers.
            ignore_mismatched_sizes: give tensors of another shape new values instead of refusing them.
            output_loading_info: also return what was missing, unexpected and mismatched, and leave the judgement to the
                caller.
            kwargs: as in transformers: dtype, device_map, attn_implementation, quantization_config, ...

        Raises:
            CheckpointLayoutError: naming the tensors that are missing, unexpected or of another shape.
            ValueError: naming a weights file that is cut short or broken.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as error:
            found = broken_file(pretrained_model_name_or_path) or f"of {pretrained_model_name_or_path}: {error}"
            raise ValueError(f"a weights file is cut short or broken, copy it again: {found}") from error
        for encoder in model.encoders.values():
            encoder.freeze_idle()  # loading makes every parameter anew
        if output_loading_info:
            return model, info
        mismatched = () if ignore_mismatched_sizes else info["mismatched_keys"]
        missing = () if pretrained_model_name_or_path is None else info["missing_keys"]
        check_layout(str(pretrained_model_name_or_path), missing, info["unexpected_keys"], mismatched)
        return model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with a README.md that names this package where the folder has none."""
        super().save_pretrained(save_directory, *args, **kwargs)
        readme = Path(save_directory) / "README.md"
        if kwargs.get("is_main_process", True) and not readme.exists():
            readme.write_text(README)

    def set_attn_implementation(
        self, attn_implementation: str | Mapping[str, str], allow_all_kernels: bool = False
    ) -> None:
        """The kernel of the LLM, and of every tower that knows it.

        Args:
            attn_implementation: a name ("eager", "sdpa", "flash_attention_2", ...), or {"": of the towers,
                "text_config": of the LLM}.
            allow_all_kernels: as in transformers.

        Raises:
            ValueError: where the LLM does not know it. A tower without attention, or with a kernel of its own, keeps
                what it has.
        """
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        text = attn_implementation.get("text_config", self.config.text_config._attn_implementation)
        own = attn_implementation.get("", self.config._attn_implementation)
        self.get_decoder().set_attn_implementation(text, allow_all_kernels=allow_all_kernels)
        self.config._attn_implementation = {"": own, "text_config": self.get_decoder().config._attn_implementation}
        self._set_tower_kernels(own, list(self.encoders))

    def _set_tower_kernels(self, kernel: str, names: Sequence[str]) -> None:
        """The kernel of these encoders, where they are models of transformers; timm's choose theirs themselves."""
        for name in names:
            for module in self.encoders[name].modules():
                if isinstance(module, PreTrainedModel) and knows_kernel(module, kernel):
                    module.set_attn_implementation(kernel)

    def _init_weights(self, module: nn.Module) -> None:
        """Towers and LLM initialise themselves; the projectors and the head follow the LLM's range.

        A model that is loaded is built without memory, so what is no weight (rotary tables of timm's towers) is made
        again here.
        """
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "init_non_persistent_buffers"):
            cast(Any, module).init_non_persistent_buffers()


def knows_kernel(model: PreTrainedModel, kernel: str) -> bool:
    """Whether a library's model can run with this attention kernel."""
    if kernel == "eager":
        return True
    if not model._can_set_attn_implementation():
        return False
    if kernel == "sdpa":
        return bool(model._supports_sdpa)
    return bool(model._supports_flex_attn if kernel == "flex_attention" else model._supports_flash_attn)


def check_layout(
    source: str, missing: Collection[str], unexpected: Collection[str], mismatched: Collection[tuple[str, Any, Any]]
) -> None:
    """Refuse a checkpoint whose tensors are not the model's.

    Args:
        source: the folder or hub id, for the error.
        missing: tensors of the model that it lacks.
        unexpected: tensors that it has and the model lacks.
        mismatched: (name, shape in the file, shape in the model).

    Raises:
        CheckpointLayoutError: naming what is missing, unexpected or of another shape.
    """
    shapes = [f"{name} (file {tuple(found)}, model {tuple(wanted)})" for name, found, wanted in mismatched]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lines = []
    for kind, names in faults.items():
        if names:
            shown = sorted(names)[:NAMED_TENSORS]
            more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
            lines.append(f"{len(names)} {kind}: {', '.join(shown)}{more}")
    if lines:
        raise CheckpointLayoutError(
            f"the weights of {source} have another layout than the configuration describes (encoders, projectors or "
            "LLM differ): " + "; ".join(lines)
        )


def broken_file(source: Any) -> str | None:
    """The first safetensors file of a folder that cannot be opened, with what is wrong; None where there is none."""
    folder = Path(source) if isinstance(source, str | Path) else None
    for path in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{path} ({error})"
    return None
