"""What the generic rules of `shrinking` do not know about single types: fields, or a function of the other fields."""

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "head_dim": 16}

OVERRIDES = {
    "blip-2": {"image_token_index": 319},
    "instructblip": {"image_token_index": 319},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
}
