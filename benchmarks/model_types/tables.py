"""The reports: what became of how many types, and thirty families in one table for people."""

from collections import Counter
from pathlib import Path

from benchmarks.harness.reporting import markdown_table, write_markdown
from benchmarks.model_types.cases import OUTCOMES, UNSOUND
from benchmarks.model_types.classes import model_types

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"

FAMILIES = {
    "BERT": "bert",
    "RoBERTa": "roberta",
    "XLM-RoBERTa": "xlm-roberta",
    "DeBERTa-v2, v3": "deberta-v2",
    "DistilBERT": "distilbert",
    "ALBERT": "albert",
    "ELECTRA": "electra",
    "MPNet": "mpnet",
    "ModernBERT": "modernbert",
    "NomicBERT": "nomic_bert",
    "Funnel": "funnel",
    "T5": "t5",
    "BART": "bart",
    "Pegasus": "pegasus",
    "Whisper": "whisper",
    "wav2vec 2.0": "wav2vec2",
    "ViT": "vit",
    "DeiT": "deit",
    "Swin": "swin",
    "ConvNeXt": "convnext",
    "DINOv2": "dinov2",
    "SAM": "sam",
    "CLIP": "clip",
    "SigLIP": "siglip",
    "BLIP-2": "blip-2",
    "LLaVA": "llava",
    "Qwen2-VL": "qwen2_vl",
    "Llama": "llama",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Qwen2, Qwen2.5": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3",
    "Phi-3": "phi3",
    "GPT-2": "gpt2",
    "GPT-NeoX": "gpt_neox",
    "gpt-oss": "gpt_oss",
    "OPT": "opt",
    "Falcon": "falcon",
    "BLOOM": "bloom",
    "OLMo 2": "olmo2",
    "DeepSeek-V3": "deepseek_v3",
    "Mamba": "mamba",
    "Mamba-2": "mamba2",
    "Zamba2": "zamba2",
    "xLSTM": "xlstm",
}

INTRODUCTION = """# Which models work

Written by `python -m benchmarks.model_types report`: do not edit. Each type of transformers {version} was made tiny
and random, calibrated, compressed to half of its linear layers, trained for a step, exported in both storages, and
loaded by its Auto class, on CPU in float32. It *works* if all tensors came back the same, none was missing or new,
and the outputs were those of the exported model. A tiny random model says whether a type goes all the way, not how
accurate it is at a ratio. What is no `torch.nn.Linear` or `Conv1D` stays as it is: experts in one tensor,
convolutions, embeddings.
"""

SETTINGS = """With `calibrate(..., leave_unusable_dense=True)`, layers that the loss does not reach, or whose weight
the model uses without calling the layer, stay dense, with a warning. Without it, the error names them."""


def summary(records):
    """Return the lines of what became of how many types, and of those that are not sound."""
    counts = Counter(record["outcome"] for record in records)
    lines = [f"{counts[outcome]:4} {outcome}: {meaning}" for outcome, meaning in OUTCOMES.items()]
    unsound = [record for record in records if record["outcome"] in UNSOUND]
    return "\n".join(lines + [f"{each['type']}: {each['stage']}: {each['reason']}" for each in unsound])


def write_report(records):
    """Write `docs/models.md`."""
    records = sorted(records, key=lambda record: record["type"])
    by_type = {record["type"]: record for record in records}
    version = records[-1]["environment"]["packages"]["transformers"]
    families = [family_row(title, by_type[name]) for title, name in FAMILIES.items() if name in by_type]
    counts = Counter(record["outcome"] for record in records)
    total = [[str(counts[outcome]), meaning] for outcome, meaning in OUTCOMES.items() if counts[outcome]]
    others = [record for record in records if record["outcome"] not in ("passed", "setting", "component")]
    parts = [
        INTRODUCTION.format(version=version),
        markdown_table(["family", "class", "result"], families),
        SETTINGS,
        f"## {_how_many(len(records), len(model_types()))}\n",
        markdown_table(["types", "what became of them"], total),
        "With a setting: " + ", ".join(_named(records, "setting")) + ".",
        "Without one: " + ", ".join(_named(records, "passed")) + ".",
        "## What did not work, and what was not tried\n",
        markdown_table(["type", "result", "reason"], [[r["type"], r["outcome"], _reason(r)] for r in others]),
    ]
    write_markdown(DOCUMENT, "\n\n".join(part.strip("\n") for part in parts))


def _how_many(run, known):
    return f"All {known} types" if run == known else f"{run} of {known} types; the others were not run yet"


def _named(records, outcome):
    return [record["type"] for record in records if record["outcome"] == outcome]


def family_row(title, record):
    """Return the row of a family: works, works with a setting, refused with which message."""
    outcome = record["outcome"]
    result = {"passed": "works", "setting": f"works with `{', '.join(record.get('settings', ()))}`"}.get(outcome)
    if outcome == "setting":
        result += f": {_cell(_without_names(record['without_it']))}"
    return [title, f"`{record.get('class', record['type'])}`", result or f"{outcome}: {_reason(record)}"]


def _without_names(reason):
    """Return what an error says of layers: which they are depends on the size of the model."""
    return reason.rpartition(": ")[2].rstrip(".") if ": " in reason else reason


def _reason(record):
    stage = f"{record['stage']}: " if record.get("stage") else ""
    dense = f" Dense: {record['dense']}" if "dense" in record else ""
    then = "".join(f" With {settings}: {reason}" for settings, reason in record.get("then", {}).items())
    return _cell(f"{stage}{record.get('reason', '')}{dense}{then}")


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
