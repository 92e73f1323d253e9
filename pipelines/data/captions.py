"""Captions: where they come from, and their tokens.

A data set without captions of its own gets them from its class names, in turn by a few templates.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.console import UserError
from pipelines.data.images import ImageSet
from pipelines.files import write_file

TEMPLATES = ("{}", "a {}", "the {}", "a picture of a {}", "a pair of {}s")
PADDING = "<pad>"  # token 0; a caption of nothing else is no caption


def captions_of(images: ImageSet, label_names: Sequence[str]) -> list[str]:
    """One caption for each image. Raises UserError when there are neither captions nor labels."""
    if images.captions is not None:
        return images.captions
    if images.labels is None:
        raise UserError(
            "a prior conditioned on captions needs a captions.jsonl in the folder of images, with lines like"
            ' {"file_name": "boots/1.png", "text": "a pair of ankle boots"}, or labels to make captions from'
        )
    names = [name.lower() for name in label_names]
    return [TEMPLATES[i % len(TEMPLATES)].format(names[label]) for i, label in enumerate(images.labels.tolist())]


def usable_text(text: Any) -> str:
    """A caption as it is. Raises UserError for what is no text, or no text that can be written (half of a surrogate pair)."""
    if not isinstance(text, str):
        raise UserError(f"a caption is a text, not {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("the text holds half of a character, a lone surrogate") from error
    return text


def library() -> Any:
    """Raises UserError when it is not installed: only captions need it."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("captions need the library `tokenizers`: pip install -e '.[text]'") from error
    return tokenizers


class CaptionTokenizer:
    """Byte-pair encoding of lower-cased text (the `tokenizers` library), fitted to the training captions."""

    def __init__(self, path: Path, vocabulary: int):
        """Raises UserError when the file is missing or is no tokenizer's, or that of another vocabulary."""
        tokenizer = library().Tokenizer
        try:
            self.tokenizer = tokenizer.from_file(str(path))
            if (largest := max(self.tokenizer.get_vocab().values(), default=0)) >= vocabulary:
                raise ValueError(f"it has a token {largest}, and the prior knows {vocabulary}")
            self.room = largest + 1 < vocabulary
        except Exception as error:  # the library raises no more special one
            raise UserError(
                f"{path} is no tokenizer ({error}); delete it and run train_all again, to have it made again as it was"
            ) from error

    @staticmethod
    def train(captions: Sequence[str], vocabulary: int, path: Path) -> None:
        """Fit to captions and write to `path`."""
        from_library = library()
        decoders, models, normalizers = from_library.decoders, from_library.models, from_library.normalizers
        pre_tokenizers, trainers = from_library.pre_tokenizers, from_library.trainers
        tokenizer = from_library.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[PADDING], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        write_file(path, tokenizer.to_str().encode())

    def tokens(self, captions: Sequence[str], length: int) -> Tensor:
        """Token ids, B T; longer captions are cut, shorter ones padded."""
        rows = torch.zeros(len(captions), length, dtype=torch.int64)
        for row, encoding in zip(rows, self.tokenizer.encode_batch(list(captions))):
            ids = torch.tensor(encoding.ids[:length], dtype=torch.int64)
            row[: len(ids)] = ids
        return rows

    def unknown_words(self, captions: Sequence[str]) -> list[str]:
        """Words that no training caption has: while the vocabulary has room, each word of these is one token.

        None are found where it is full.
        """
        found: dict[str, None] = {}
        for caption, encoding in zip(captions, self.tokenizer.encode_batch(list(captions))):
            for word, tokens in Counter(encoding.word_ids).items():
                if self.room and tokens > 1:
                    start, end = encoding.word_to_chars(word)
                    found[caption[start:end].strip()] = None
        return [*found]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """The length of each caption, in tokens."""
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch(list(captions))]
