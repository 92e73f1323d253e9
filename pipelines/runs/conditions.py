"""The contexts of a run's learned prior: the label of each image, or its caption as tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import processes
from pipelines.console import UserError, counted, nearest, say
from pipelines.data.captions import CaptionTokenizer, captions_of
from pipelines.data.images import ImageSet
from pipelines.data.layout import some
from pipelines.runs.dataset import read_facts
from pipelines.runs.run import Run
from stage2_prior.conditions import Caption, Cluster


def contexts_of(run: Run, images: ImageSet, part: str = "train") -> Tensor | None:
    """The context of each image of a split: its label, N, or its caption's tokens, N T. None for clusters, found by the prior.

    Raises UserError when the tokenizer, which is fitted to the training split alone, is missing and this is another one.
    """
    condition = run.condition
    if isinstance(condition, Cluster):
        return None
    if not isinstance(condition, Caption):
        return images.labels
    path = run.folder / "tokenizer.json"
    captions = captions_of(images, read_facts(run).label_names)
    vocabulary = condition.vocabulary

    def fitted() -> None:
        if path.is_file():
            return
        if part != "train":
            raise UserError(f"there is no {path}. Run the train_all command of this run again, to have it made as it was.")
        CaptionTokenizer.train(captions, vocabulary, path)

    processes.on_first(fitted)
    return CaptionTokenizer(path, vocabulary).tokens(captions, condition.length)


def check_captions(run: Run, images: ImageSet) -> None:
    """Fit the tokenizer to the captions of the training images before anything is trained, and say how many are cut.

    Raises UserError where there are none. A tokenizer from before, when nothing was trained yet, may be of other captions.
    """
    condition, path = run.condition, run.folder / "tokenizer.json"
    if not isinstance(condition, Caption):
        return
    if not any((run.folder / "stage1").glob("step-*")):
        processes.on_first(lambda: path.unlink(missing_ok=True))
    rows = contexts_of(run, images)
    captions = captions_of(images, read_facts(run).label_names)
    lengths = CaptionTokenizer(path, condition.vocabulary).lengths(captions)
    cut = sum(length > condition.length for length in lengths)
    if cut and rows is not None:
        equal = len({*captions}) - len(rows.unique(dim=0))
        say(
            f"warning: captions longer than {condition.length} tokens, which are cut: {cut} of {len(captions)}"
            f"{f'; equal to another once cut: {equal}' if equal > 0 else ''}."
            f" --prior.condition.length {max(lengths)} takes all whole"
        )


def contexts_asked(
    run: Run,
    count: int,
    label: str | int | Sequence[str | int] | None = None,
    caption: str | Sequence[str] | None = None,
) -> Tensor | None:
    """The contexts of `count` images that are asked for: labels, N, or tokens, N T; None where neither is given.

    label: by name or number, for all images or one for each; caption: likewise. Raises UserError for an unknown label, or what
    the prior does not take.
    """
    each = asked_of_each(run, count, label, caption)
    if each is None:
        return None
    if isinstance(run.condition, Caption):
        for remark in remarks_on(run, each):
            say(f"warning: {remark}")
        return CaptionTokenizer(run.folder / "tokenizer.json", run.condition.vocabulary).tokens(each, run.condition.length)
    names = read_facts(run).label_names
    return torch.tensor([label_number(one, names) for one in each])


def remarks_on(run: Run, captions: Sequence[str]) -> list[str]:
    """What of captions the prior of a run does not see: words that it cannot know, and what is cut off."""
    if not isinstance(run.condition, Caption):
        return []
    tokenizer = CaptionTokenizer(run.folder / "tokenizer.json", run.condition.vocabulary)
    each, remarks = [*dict.fromkeys(captions)], []
    if unknown := tokenizer.unknown_words(each):
        remarks.append(f"words of no training caption, which the prior cannot know: {some(unknown)}")
    if cut := [one for one in each if tokenizer.lengths([one])[0] > run.condition.length]:
        remarks.append(f"captions longer than {run.condition.length} tokens, which are cut: {some(cut)}")
    return remarks


def asked_of_each(run: Run, count: int, label: Any = None, caption: Any = None) -> list[Any] | None:
    """The label or caption of each of `count` images, as it was asked for; None where neither is given.

    Raises UserError for what the prior does not take, another number of them, or captions that are no texts.
    """
    if label is not None and caption is not None:
        raise UserError("give a label or a caption, not both")
    wanted, given = ("label", label) if label is not None else ("caption", caption)
    if given is None:
        return None
    if run.conditioned_on != wanted:
        raise UserError(f"the prior of {run.known_as} takes no {wanted}; {takes(run)}")
    given = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given] * int(count)
    if len(each) != count:
        raise UserError(f"{counted(len(each), wanted)} for {counted(count, 'image')}: give one, or one for each image")
    if wanted == "caption" and (others := [one for one in each if not isinstance(one, str)]):
        raise UserError(f"a caption is a text, not {others[0]!r}")
    return each


def label_number(name: Any, names: list[str]) -> int:
    """The number of a label.

    name: its name, in upper or lower case, or either half of a name like "5 - five"; or its number, as digits too where names are
    no numbers. Raises UserError for an unknown label, and for what is neither.
    """
    name = name.item() if isinstance(name, Tensor | np.generic) else name
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UserError(f"a label is a name or a number, not {name!r}")
    if isinstance(name, int):
        if not 0 <= name < len(names):
            raise UserError(f"there is no label number {name}; labels are numbers from 0 to {len(names) - 1}, or names")
        return name
    found = [number for number, known in enumerate(names) if name.lower() in (known.lower(), *known.lower().split(" - "))]
    found = [number for number in found if names[number] == name] or found
    numbers = {str(number): number for number in range(len(names))}
    if not found and name in numbers and not any(known.split(" - ")[0].isdecimal() for known in names):
        return numbers[name]
    if not found:
        raise UserError(f"there is no label {name!r}{nearest(name, names)}")
    return found[0]


def takes(run: Run) -> str:
    """What the prior is conditioned on, in words."""
    option = {None: "was trained without labels and captions", "label": "takes a label", "caption": "takes a caption"}
    return f"it {option[run.conditioned_on]}"
