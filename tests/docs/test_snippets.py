"""The Python of README and of the documentation runs, on tiny models; hubs are folders of this machine."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import IntervalStrategy

from peft_jactus import export_compressed
from tests.docs.snippets import blocks_of, run_page
from tests.support.compressed_models import (
    VOCABULARY,
    batches_for,
    calibrated,
    tiny_bert,
    tiny_llama,
    tiny_vit,
    trained,
)
from tests.support.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {
    str(page.relative_to(ROOT)): blocks_of(page.read_text(encoding="utf-8"), page.relative_to(ROOT)) for page in PAGES
}
ROWS = 8

pytestmark = [
    # trl's configs have a field by the name that transformers 5.23 replaced.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT looks for an adapter's tokenizer on the Hub, where the folder has none.
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
]


def arguments(config_class=TrainingArguments, **options):
    return config_class(
        output_dir="trainer", max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, dataloader_pin_memory=False, **options,
    )  # fmt: skip


def rows_of(model):
    """Return the rows of a model's batches."""
    batches = batches_for(model)
    return [{key: values[row] for key, values in batch.items()} for batch in batches for row in range(2)]


def texts(*names):
    rows = [{name: f"w{5 + row} w{9 + row} w{20 + i}" for i, name in enumerate(names)} for row in range(ROWS)]
    return Dataset.from_list(rows)


# -- what pages take for granted --------------------------------------------------------------------------


def common(model):
    return {
        "torch": torch,
        "Trainer": Trainer,
        "model": model,
        "batches": batches_for(model),
        "train_loader": batches_for(model),
        "loader": batches_for(model),
        "rows": rows_of(model),
        "collator": default_data_collator,
        "args": arguments(),
        "tokenizer": tiny_tokenizer(),
    }


def classification():
    return common(tiny_bert())


def language():
    return common(tiny_llama()) | {"dense": tiny_llama(), "adapted": trained(tiny_llama())}


def shipped():
    """A trained classifier that still has its adapter."""
    return classification() | {"model": trained(tiny_bert())}


def with_compressed(make, of):
    """Return what a page takes for granted where a folder ``compressed`` is there already."""
    model = trained(of(), adaptation_rank=0)
    export_compressed(model, "compressed", overwrite=True, progress_bar=False)
    return make()


def mid_run():
    """Checkpoints that the page resumes from."""
    args = arguments()
    args.output_dir, args.save_strategy, args.max_steps = "output", IntervalStrategy.STEPS, 3
    return classification() | {"args": args}


def preferences():
    trl = pytest.importorskip("trl")
    return common(tiny_llama()) | {
        "dense": tiny_llama(),
        "fresh": tiny_llama(),
        "args": arguments(trl.DPOConfig, max_length=16, gradient_checkpointing=False),
        "sft_args": arguments(trl.SFTConfig, max_length=16, gradient_checkpointing=False),
        "preferences": texts("prompt", "chosen", "rejected"),
        "texts": texts("text"),
    }


def vision():
    size = {"height": 8, "width": 8}
    model = tiny_vit()
    return common(model) | {"images": rows_of(model), "processor": transformers.ViTImageProcessor(size=size)}


def wide_llama():
    """Wide enough for several experts of 16 terms in each layer."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    ).eval()


def routing():
    dense = wide_llama()
    prompts = {key: values for key, values in batches_for(dense)[0].items() if key != "labels"}
    return language() | {
        "dense": dense,
        "statistics": calibrated(dense, retained_ratio=0.8, adaptation_rank=0).statistics,
        "corpus": rows_of(dense),
        "prompts": prompts | {"max_new_tokens": 4},
    }


def sentences():
    st = pytest.importorskip("sentence_transformers")
    pairs = [{"anchor": f"w{5 + row} w{9 + row}", "positive": f"w{20 + row} w{40 + row} w3"} for row in range(ROWS)]
    args = arguments(st.SentenceTransformerTrainingArguments)
    return {"pairs": Dataset.from_list(pairs), "args": args}


# What each page with code takes for granted.
NAMESPACES = {
    "README.md": classification,
    "docs/bits.md": language,
    "docs/concepts/adaptation.md": classification,
    "docs/concepts/ranks.md": classification,
    "docs/concepts/statistics.md": classification,
    "docs/concepts/storage.md": dict,
    "docs/from_lora.md": classification,
    "docs/howto/dpo.md": preferences,
    "docs/howto/full_size_first.md": mid_run,
    "docs/howto/hub.md": shipped,
    "docs/howto/lora.md": lambda: with_compressed(classification, tiny_bert),
    "docs/howto/ratio.md": classification,
    "docs/howto/sentence_transformers.md": sentences,
    "docs/howto/vision.md": vision,
    "docs/index.md": classification,
    "docs/install.md": dict,
    "docs/quickstart.md": classification,
    "docs/ranks_by_prompt.md": lambda: with_compressed(routing, wide_llama),
    "docs/scale.md": language,
    "docs/tools.md": dict,
    "docs/vllm.md": lambda: with_compressed(language, tiny_llama),
}

# -- a hub of folders: a name such as user/model is a path, too ----------------------------------------------


def bert_base(folder):
    tiny_bert().bert.save_pretrained(folder)
    tiny_tokenizer(model_max_length=16).save_pretrained(folder)


def vit_base(folder):
    tiny_vit().vit.save_pretrained(folder)


def sentence_model(folder):
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    bert_base(folder / "bert")
    parts = [modules.Transformer(str(folder / "bert")), modules.Pooling(32), modules.Normalize()]
    st.SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder))


HUB = {
    "google-bert/bert-base-uncased": bert_base,
    "google/vit-base-patch16-224-in21k": vit_base,
    "sentence-transformers/all-MiniLM-L6-v2": sentence_model,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Work in a folder where the models are that pages load by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def fill(code):
        for name in HUB:
            if f'"{name}"' in code:
                HUB[name](tmp_path / name)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield fill


# -- tests -------------------------------------------------------------------------------------------------


def test_every_page_with_code_says_what_it_takes_for_granted():
    assert {page for page, blocks in BLOCKS.items() if blocks} == set(NAMESPACES)


@pytest.mark.parametrize("page", NAMESPACES)
def test_the_code_of_a_page_runs(page, hub):
    blocks = BLOCKS[page]
    hub("".join(block.code for block in blocks))
    run_page(blocks, {"__name__": "page", **NAMESPACES[page]()})


# All that is not run; one more has to be entered here.
NOT_RUN = {"docs/howto/hub.md": "uploads to the Hub", "docs/tools.md": "needs onnx and onnxscript"}
LEFT_OUT = [block for blocks in BLOCKS.values() for block in blocks if block.reason]


def test_nothing_else_is_left_out():
    assert sorted(block.page for block in LEFT_OUT) == sorted(NOT_RUN)


@pytest.mark.parametrize("block", LEFT_OUT, ids=str)
def test_what_is_not_run_is_python_and_has_its_reason(block):
    compile(block.code, block.page, "exec")
    assert block.reason.startswith(NOT_RUN[block.page])
    pytest.skip(block.reason)  # so that the summary of the tests shows it


PAGE = """# A page

```python
first = seed + 1
```

<!-- not run: needs the moon -->
```python
reach_for(moon)
```

- in a list

  ```python
  second = first + 1
  ```

```bash
not python
```
"""


def test_blocks_run_in_order_in_one_namespace():
    namespace = {"seed": 1}
    assert run_page(blocks_of(PAGE), namespace) == 2
    assert (namespace["first"], namespace["second"]) == (2, 3)
    assert [(block.line, block.reason) for block in blocks_of(PAGE)] == [(4, None), (9, "needs the moon"), (15, None)]


def test_a_block_that_does_not_run_fails_with_its_line():
    with pytest.raises(NameError, match="seed") as failure:
        run_page(blocks_of(PAGE, "page.md"), {})
    where = failure.traceback[-1]
    assert (Path(where.path).name, where.lineno + 1) == ("page.md", 4)


def test_a_block_that_does_not_run_at_all_fails_too():
    with pytest.raises(SyntaxError):
        run_page(blocks_of("```python\nfrom peft import\n```\n"), {})
