"""What the generic rules of `shrinking` do not know about single types: fields, or a function of the other fields."""

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "head_dim": 16}

# Images of 1024 x 1024, in a tower whose sizes have to go with those of two other configs.
_SAM_TOWER = {"image_size": 128, "num_pos_feats": 32}
_SAM_PROMPTS = {"image_size": 128, "image_embedding_size": 8}


def _resnet(*stages):
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return {
        "backbone_config": {"model_type": "resnet", **sizes, "out_features": [f"stage{stage}" for stage in stages]}
    }


OVERRIDES = {
    # Their default backbone is timm's.
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "table-transformer"), _resnet(4)),
    "deformable_detr": _resnet(2, 3, 4),
    "sam_vision_model": _SAM_TOWER,
    "sam_hq_vision_model": _SAM_TOWER,
    "sam_prompt_encoder": _SAM_PROMPTS,
    "sam_hq_prompt_encoder": _SAM_PROMPTS,
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "blt": {"encoder_hash_byte_group_vocab": 320},
    "blip-2": {"image_token_index": 319},
    "instructblip": {"image_token_index": 319},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
}
