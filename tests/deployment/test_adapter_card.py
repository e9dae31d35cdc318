"""The model card of an adapter: who loads it elsewhere learns what to install and to import."""

import re

from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.support.compressed_models import batches_for, compressed, logits_of, tiny_bert, tiny_llama, trained

IMPORT = "import peft_jactus  # pip install peft-jactus"


def card_in(folder):
    return ModelCard.load(folder / "README.md")


def test_it_says_how_to_load_the_adapter(tmp_path):
    model = trained(tiny_llama())
    model.save_pretrained(tmp_path)
    card = card_in(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert snippet.startswith(IMPORT)
    names = {"base_model": tiny_llama()}
    exec(snippet.replace("path/or/name/of/this/repository", str(tmp_path)), names)
    assert (logits_of(names["model"]) == logits_of(model)).all()
    assert "`KeyError: 'JACTUS'`" in card.text
    assert {"peft-jactus", "transformers"} < set(card.data.tags)
    assert card.data.library_name == "peft"


def test_it_says_so_once_and_keeps_what_others_wrote(tmp_path):
    model = compressed(tiny_llama())
    ModelCard("---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n").save(tmp_path / "README.md")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert card.text.count("import peft_jactus") == 1
    assert card.text.index("# Mine") < card.text.index("import peft_jactus") < card.text.index("My words.")
    assert card.data.license == "mit"


def test_a_card_without_a_heading(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    compressed(tiny_llama()).save_pretrained(tmp_path)
    assert card_in(tmp_path).text.index("import peft_jactus") < card_in(tmp_path).text.index("My words.")


def test_the_trainer_s_cards_say_it(tmp_path):
    model = compressed(tiny_bert())
    rows = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches_for(model.get_base_model())]
    args = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    assert IMPORT in card_in(tmp_path / "checkpoint-1").text
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = card_in(tmp_path)
    assert IMPORT in card.text
    assert card.data.model_name == "mine"


def test_cards_of_other_tuners_are_not_touched(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    assert "jactus" not in (tmp_path / "README.md").read_text()
