"""Weights of the published PGSeg and GroupViT networks, by the names of their tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from protoseg.models.pgseg.grouping import ImageConfig

# Their name, as a regular expression, and ours. A name with no entry here is reported as left out.
_UNIT = r"^img_encoder\.layers\.(\d+)\.downsample\."
_PAIRS = [(re.compile(theirs), ours) for theirs, ours in (
    (r"^img_encoder\.patch_embed\.proj\.", "image.stem."),
    (r"^img_encoder\.patch_embed\.norm\.", "image.norm_stem."),
    (r"^img_encoder\.pos_embed$", "image.position"),
    (r"^img_encoder\.norm\.", "image.norm."),
    (r"^img_encoder\.layers\.(\d+)\.group_token$", r"image.stages.\1.tokens"),
    (r"^img_encoder\.layers\.(\d+)\.group_projector\.0\.", r"image.stages.\1.carry.norm."),
    (r"^img_encoder\.layers\.(\d+)\.group_projector\.1\.", r"image.stages.\1.carry.mlp."),
    (r"^img_encoder\.layers\.(\d+)\.blocks\.", r"image.stages.\1.blocks."),
    (_UNIT + r"norm_tokens\.", r"image.stages.\1.unit.mix.norm."),
    (_UNIT + r"mlp_inter\.", r"image.stages.\1.unit.mix.mlp."),
    (_UNIT + r"norm_post_tokens\.", r"image.stages.\1.unit.norm_mixed."),
    (_UNIT + r"norm_x\.", r"image.stages.\1.unit.norm_tokens."),
    (_UNIT + r"pre_assign_attn\.attn\.proj\.", r"image.stages.\1.unit.attend.project."),
    (_UNIT + r"pre_assign_attn\.attn\.q_proj\.", r"image.stages.\1.unit.attend.query."),
    (_UNIT + r"pre_assign_attn\.attn\.k_proj\.", r"image.stages.\1.unit.attend.key."),
    (_UNIT + r"pre_assign_attn\.attn\.v_proj\.", r"image.stages.\1.unit.attend.value."),
    (_UNIT + r"pre_assign_attn\.norm2\.", r"image.stages.\1.unit.attend.norm_mlp."),
    (_UNIT + r"pre_assign_attn\.norm_post\.", r"image.stages.\1.unit.attend.norm_out."),
    (_UNIT + r"pre_assign_attn\.mlp\.", r"image.stages.\1.unit.attend.mlp."),
    (_UNIT + r"assign\.q_proj\.", r"image.stages.\1.unit.query."),
    (_UNIT + r"assign\.k_proj\.", r"image.stages.\1.unit.key."),
    (_UNIT + r"assign\.v_proj\.", r"image.stages.\1.unit.value."),
    (_UNIT + r"assign\.proj\.", r"image.stages.\1.unit.project."),
    (_UNIT + r"norm_new_x\.", r"image.stages.\1.unit.norm_out."),
    (_UNIT + r"mlp_channels\.", r"image.stages.\1.unit.mlp."),
    (r"^img_encoder\.layers\.(\d+)\.downsample_spatial\.mu$", r"image.stages.\1.npr.mu"),
    (r"^img_encoder\.layers\.(\d+)\.downsample_spatial\.mapping_x\.linear_hidden\.", r"image.stages.\1.reconstruct."),
    (r"^img_encoder\.layers\.(\d+)\.downsample_spatial\.mapping_x\.linear_out\.", r"image.stages.\1.reconstruct.3."),
    (r"^(img|text)_projector\.linear_hidden\.", r"\1_projector."),
    (r"^(img|text)_projector\.linear_out\.", r"\1_projector.3."),
    (r"^text_encoder\.(?=token_embedding|positional_embedding|transformer|ln_final)", "text.tower."),
    (r"^logit_scale$", "log_scale"),
)]  # fmt: skip


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the sizes off the tensors, as arguments of ``PGSegConfig``."""
    try:
        position, patches = state["img_encoder.pos_embed"], state["img_encoder.patch_embed.proj.weight"]
        embed = state["img_projector.linear_out.weight"]
        words = state["text_encoder.token_embedding.weight"]
    except KeyError as error:
        raise ValueError(
            f"from_published: no tensor {error} in the checkpoint; is it one of PGSeg or GroupViT? It holds "
            f"{', '.join(sorted(state)[:5])} and others"
        ) from None

    dim, patch = patches.shape[0], patches.shape[-1]
    side = math.isqrt(position.shape[1])

    depths: list[int] = []
    groups: list[int] = []
    while any(name.startswith(f"img_encoder.layers.{len(depths)}.blocks.") for name in state):
        layer = f"img_encoder.layers.{len(depths)}."
        numbers = {int(name[len(layer) :].split(".")[1]) for name in state if name.startswith(layer + "blocks.")}
        depths.append(len(numbers))
        if layer + "downsample.mlp_inter.fc2.weight" in state:
            groups.append(state[layer + "downsample.mlp_inter.fc2.weight"].shape[0])

    reconstruct = any("downsample_spatial" in name for name in state)
    npr: Mapping[str, Any] | None = {"published": True} if reconstruct else None
    image = ImageConfig(
        image_size=side * patch, patch_size=patch, dim=dim, heads=dim // 64, depths=tuple(depths), groups=tuple(groups),
        reconstruct=reconstruct, npr=npr,
    )  # fmt: skip

    blocks = {name.split(".")[3] for name in state if name.startswith("text_encoder.transformer.resblocks.")}
    return {
        "image": image,
        "text_width": words.shape[1],
        "text_layers": len(blocks),
        "embed_dim": embed.shape[0],
        "hidden": embed.shape[1],
    }


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give the tensors our names and shapes; also returns the names that nothing here needs."""
    result: dict[str, Tensor] = {}
    left_out: list[str] = []

    last = sum(1 for name in state if re.fullmatch(r"img_encoder\.layers\.\d+\.group_token", name))
    for name, value in state.items():
        theirs = re.sub(rf"^img_encoder\.layers\.{last}\.blocks\.", "image.blocks.", name)
        for pattern, ours in _PAIRS:
            theirs, found = pattern.subn(ours, theirs, count=1)
            if found:
                break
        if theirs == name:
            left_out.append(name)
            continue
        result[theirs.replace("img_projector", "image_projector")] = _shaped(theirs, value)

    if "img_encoder.logit_scale" in state:  # one temperature for all of theirs
        left_out.remove("img_encoder.logit_scale")
        result |= {f"image.stages.{stage}.npr.log_scale": state["img_encoder.logit_scale"] for stage in range(last)}
    return result, left_out


def _shaped(name: str, value: Tensor) -> Tensor:
    if name == "image.position":
        side = math.isqrt(value.shape[1])
        return value.transpose(1, 2).reshape(1, -1, side, side)
    if name.endswith((".tokens", ".mu")):
        return value.squeeze(0)
    if value.dim() == 3 and ("reconstruct" in name or "_projector" in name):
        return value.squeeze(-1)  # a convolution over tokens of width 1
    return value
