"""Batches of models whose inputs have to go with each other, by the type of the config."""

import torch

from benchmarks.model_types.inputs import FRAMES, LENGTH, ROWS, TARGET_LENGTH, find

_PATCHES = 4  # of a side


def special_batch(make):
    """Return the batch that the type of a config needs, or ``None`` if the general rules will do.

    Args:
        make: The `Inputs` of a model.
    """
    maker = BATCHES.get(make.config.model_type)
    batch = maker(make) if maker else None
    return batch and {name: value for name, value in batch.items() if name in make.parameters}


def _lxmert(make):
    features = make.randn(ROWS, 5, make.config.visual_feat_dim)
    return {"input_ids": make.ids(LENGTH), "visual_feats": features, "visual_pos": make.randn(ROWS, 5, 4).sigmoid()}


def _idefics(make):
    return {
        "input_ids": make.ids(LENGTH),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "pixel_values": make.images(1)[0],
        "image_attention_mask": torch.ones(ROWS, LENGTH, 1, dtype=torch.long),
    }


def _kosmos2(make):
    places = make.config.latent_query_num
    marks = torch.zeros(ROWS, places + LENGTH, dtype=torch.long)
    marks[:, :places] = 1
    ids = make.ids(places + LENGTH)
    return {"pixel_values": make.images()[0], "input_ids": ids, "image_embeds_position_mask": marks}


def _pi0(make):
    config, images = make.config, make.images(1)[0]
    places = (images.shape[-1] // find(config, "patch_size")) ** 2
    ids = torch.cat([torch.full((ROWS, places), make.placeholder_id()), make.ids(LENGTH)], dim=1)
    return {
        "state": make.randn(ROWS, config.max_state_dim),
        "actions": make.randn(ROWS, config.chunk_size, config.max_action_dim),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": images,
        "pixel_attention_mask": torch.ones(ROWS, 1, dtype=torch.bool),
    }


def _pix2struct(make):
    rows = torch.arange(_PATCHES).repeat_interleave(_PATCHES) + 1
    columns = torch.arange(_PATCHES).repeat(_PATCHES) + 1
    places = torch.stack([rows, columns], dim=-1).expand(ROWS, -1, -1)
    pixels = make.randn(ROWS, _PATCHES**2, find(make.config, "patch_embed_hidden_size"))
    return {"flattened_patches": torch.cat([places, pixels], dim=-1), "decoder_input_ids": make.ids(LENGTH)}


def _flat_patches(make, side=_PATCHES):
    return make.randn(ROWS, side**2, 3 * find(make.config, "patch_size") ** 2)


def _siglip2(make):
    return {
        "input_ids": make.ids(LENGTH),
        "pixel_values": _flat_patches(make),
        "pixel_attention_mask": torch.ones(ROWS, _PATCHES**2, dtype=torch.long),
        "spatial_shapes": torch.tensor([[_PATCHES, _PATCHES]] * ROWS),
    }


def _gemma4_vision(make):
    side = 2 * make.config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(ROWS, -1, -1)
    return {"pixel_values": _flat_patches(make, side).sigmoid(), "pixel_position_ids": places}


def _emu3(make):
    images = make.randn(ROWS, 3, 64, 64)
    return {"input_ids": make.ids(LENGTH), "pixel_values": images, "image_sizes": torch.tensor([[64, 64]] * ROWS)}


def _musicgen(make):
    books = find(make.config, "num_codebooks")
    return {"input_ids": make.ids(LENGTH), "decoder_input_ids": make.ids(TARGET_LENGTH, rows=ROWS * books)}


def _musicgen_melody(make):
    return _musicgen(make) | {"input_features": make.randn(ROWS, 8, make.config.num_chroma)}


def _seggpt(make):
    height, width = make.config.image_size
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: make.randn(ROWS, 3, height // 2, width) for name in names}


def _frames(make, width):
    mask = torch.ones(ROWS, FRAMES, dtype=torch.long)
    return {"input_features": make.randn(ROWS, FRAMES, width), "input_features_mask": mask}


def _qwen3_asr_encoder(make):
    length = 2 * make.config.n_window
    mask = torch.ones(ROWS, length, dtype=torch.long)
    return {"input_features": make.randn(ROWS, make.config.num_mel_bins, length), "input_features_mask": mask}


def _tvp(make):
    size = make.config.max_img_size
    return {"input_ids": make.ids(LENGTH, rows=1), "pixel_values": make.randn(1, 2, 3, size, size)}  # takes one row


BATCHES = {
    "lxmert": _lxmert,
    "idefics": _idefics,
    "kosmos-2": _kosmos2,
    "pi0": _pi0,
    "pix2struct": _pix2struct,
    "siglip2": _siglip2,
    "siglip2_vision_model": _siglip2,
    "gemma4_vision": _gemma4_vision,
    "gemma4_audio": lambda make: _frames(make, 128),
    "fun_asr_nano_encoder": lambda make: _frames(make, 560),
    "granite_speech5_encoder": lambda make: _frames(make, 4 * find(make.config, "num_mel_bins")),
    "granite_speech5_ctc": lambda make: _frames(make, 4 * find(make.config, "num_mel_bins")),
    "qwen3_asr_encoder": _qwen3_asr_encoder,
    "emu3": _emu3,
    "musicgen": _musicgen,
    "musicgen_melody": _musicgen_melody,
    "seggpt": _seggpt,
    "tvp": _tvp,
    "voxtral_realtime": lambda make: {"input_ids": make.ids(FRAMES // 8), "input_features": make.features()[0]},
    "kyutai_speech_to_text": lambda make: {
        "input_ids": make.ids(LENGTH)[..., None].repeat(1, 1, make.config.num_codebooks + 1)
    },
}
