"""Accuracy of a routed model on the commonsense sets: the endings of a question run the ranks chosen for it."""

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from benchmarks.parse.models import choose, read_by_router


class RoutedByQuestion(HFLM):
    """A routed model for lm-evaluation-harness, whose router does not see the endings.

    Args:
        routed: A routed model.
        tokenizer: Its tokenizer.
        ratio: Active share.
        kind: As in `choose`.
        batch_size: Endings at a time.
    """

    def __init__(self, routed, tokenizer, ratio, kind, *, batch_size=16):
        super().__init__(routed, tokenizer=tokenizer, batch_size=batch_size)
        self.ratio, self.kind = ratio, kind

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **options):
        del options
        order = sorted(range(len(requests)), key=lambda number: sum(map(len, requests[number][1:])))
        found = {}
        for start in tqdm(range(0, len(order), self.batch_size_per_gpu), disable=disable_tqdm):
            numbers = order[start : start + self.batch_size_per_gpu]
            questions, endings = zip(*(requests[number][1:] for number in numbers), strict=True)
            found.update(zip(numbers, self._scores(questions, endings), strict=True))
        return [found[number] for number in range(len(requests))]

    def _scores(self, questions, endings):
        """Return for each ending its log-probability, and whether it is the most likely one, token by token."""
        pooled = read_by_router(self.model, **_padded(questions))
        gates = choose(self.model, pooled, self.ratio, self.kind).float()
        texts = [question + ending for question, ending in zip(questions, endings, strict=True)]
        with self.model.rank_router.gated(gates):
            logits = self.model(**_padded(texts)).logits.float().log_softmax(-1)
        for row, question, ending in zip(logits, questions, endings, strict=True):
            wanted = torch.tensor(ending)
            predicted = row[len(question) - 1 :][: len(ending)]
            likelihood = predicted.gather(1, wanted.unsqueeze(1)).sum()
            yield float(likelihood), bool((predicted.argmax(1) == wanted).all())


def _padded(texts):
    rows = [torch.tensor(text) for text in texts]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
