"""What the generic rules of `shrinking` do not know about single types: fields, or a function of the other fields."""

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "head_dim": 16}

OVERRIDES = {
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "blt": {"encoder_hash_byte_group_vocab": 320},
    "blip-2": {"image_token_index": 319},
    "instructblip": {"image_token_index": 319},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
}
