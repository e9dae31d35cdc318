"""Which positions count where a model has several towers: a mask belongs to the one whose inputs it came with."""

import pytest
import torch
import transformers

from peft_jactus import JactusConfig, calibrate

DIM = 8
COMMON = {"hidden_size": DIM, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
LENGTHS = [10, 4]  # of two texts, padded to 10
MASK = torch.tensor([[1] * length + [0] * (10 - length) for length in LENGTHS])


def tiny_clip():
    text = transformers.CLIPTextConfig(vocab_size=40, max_position_embeddings=12, eos_token_id=39, **COMMON)
    vision = transformers.CLIPVisionConfig(image_size=6, patch_size=2, **COMMON)  # 9 patches and one for the class
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=DIM)
    )


def tiny_siglip():
    text = transformers.SiglipTextConfig(vocab_size=40, max_position_embeddings=12, **COMMON)
    vision = transformers.SiglipVisionConfig(image_size=10, patch_size=2, **COMMON)  # 25 patches
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    )


def counted(model, features, **options):
    torch.manual_seed(0)
    config = JactusConfig(target_modules="all-linear", exclude_modules=options.pop("exclude", None))
    batch = {"input_ids": torch.randint(3, 38, MASK.shape), "attention_mask": MASK, "return_loss": True, **features}
    statistics = calibrate(model.eval(), config, [batch], progress_bar=False, **options)
    return {name: layer.num_tokens for name, layer in statistics.items()}


def in_blocks(counts, tower):
    return {count for name, count in counts.items() if name.startswith(tower) and "layers." in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_many_patches_as_tokens_are_all_counted(dtype):
    counts = counted(tiny_clip().to(dtype), {"pixel_values": torch.randn(2, 3, 6, 6)})
    assert in_blocks(counts, "vision_model") == {20}
    assert in_blocks(counts, "text_model") == {sum(LENGTHS)}


def test_other_numbers_of_patches_are_counted_without_a_word(caplog):
    counts = counted(
        tiny_siglip(),
        {"pixel_values": torch.randn(2, 3, 10, 10)},
        exclude=["out_proj", "fc1", "fc2", "head"],
        leave_unusable_dense=True,
    )
    vision = {count for name, count in counts.items() if name.startswith("vision_model.encoder")}
    assert vision == {50}
    assert "its padding is counted" not in caplog.text


def test_masks_of_a_language_model_with_images_are_those_of_its_text():
    text = transformers.LlamaConfig(vocab_size=40, **COMMON)
    vision = transformers.CLIPVisionConfig(image_size=6, patch_size=2, **COMMON)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 38, (2, 14))
    ids[:, :9] = 39  # the patches
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    batch = {
        "input_ids": ids, "attention_mask": mask, "labels": ids, "pixel_values": torch.randn(2, 3, 6, 6),
    }  # fmt: skip
    statistics = calibrate(
        model, JactusConfig(target_modules="all-linear"), [batch], leave_unusable_dense=True, progress_bar=False
    )
    counts = {name: layer.num_tokens for name, layer in statistics.items() if layer.num_tokens}
    language = {count for name, count in counts.items() if "language_model.layers" in name}
    assert language == {26}
    assert {count for name, count in counts.items() if "vision_tower" in name and "layers." in name} == {20}
    assert {count for name, count in counts.items() if "multi_modal_projector" in name} == {18}


def test_no_hook_stays():
    model = tiny_clip()
    counted(model, {"pixel_values": torch.randn(2, 3, 6, 6)})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Detector(torch.nn.Module):
    """Its encoder returns feature maps in a list, as those of RT-DETR and D-FINE."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(DIM, DIM)

        def forward(self, pixels):
            return {0: [self.layer(pixels)]}

    def __init__(self):
        super().__init__()
        self.config = transformers.PreTrainedConfig(is_encoder_decoder=True)
        self.encoder = self.Encoder()
        self.decoder = torch.nn.Linear(DIM, DIM)

    def get_encoder(self):
        return self.encoder

    def forward(self, pixels):
        return self.decoder(self.encoder(pixels)[0][0])


def test_an_encoder_may_return_a_list_of_feature_maps():
    config = JactusConfig(target_modules=["encoder.layer", "decoder"])
    batch = {"pixels": torch.randn(2, 5, DIM)}
    loss = {"loss_fn": lambda model, batch: model(**batch).square().mean(), "loss_reduction": "sum"}
    statistics = calibrate(Detector(), config, [batch], progress_bar=False, **loss)
    assert {name: layer.num_tokens for name, layer in statistics.items()} == {"encoder.layer": 10, "decoder": 10}
