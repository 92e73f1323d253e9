"""What a run's learned prior is told of an image: its label, or its caption as tokens."""

import torch
from torch import Tensor

from pipelines import processes
from pipelines.console import UserError, nearest
from pipelines.data.captions import CaptionTokenizer, captions_of
from pipelines.data.images import ImageSet
from pipelines.runs.dataset import read_facts
from pipelines.runs.run import Run
from stage2_prior.conditions import Caption, ClassLabel


def contexts_of(run: Run, images: ImageSet, part: str = "train") -> Tensor | None:
    """What a conditional prior is told of each image of a split: its label, or its caption's tokens.

    Raises UserError when the tokenizer, which is fitted to the training split alone, is missing and this is another one.
    """
    condition = run.condition
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
    return CaptionTokenizer(path).tokens(captions, condition.length)


def context_of_text(run: Run, caption: str) -> Tensor:
    """The tokens of one caption. Raises UserError for a prior that takes none."""
    if not isinstance(run.condition, Caption):
        raise UserError(f"the prior of {run.folder} takes no text; {takes(run)}")
    return CaptionTokenizer(run.folder / "tokenizer.json").tokens([caption], run.condition.length)[0]


def context_of_label(run: Run, name: str) -> Tensor:
    """The number of a label by its name. Raises UserError for an unknown one, or a prior that takes none."""
    if not isinstance(run.condition, ClassLabel):
        raise UserError(f"the prior of {run.folder} takes no label; {takes(run)}")
    return torch.tensor(label_number(name, read_facts(run).label_names))


def label_number(name: str, names: list[str]) -> int:
    """Of a label by its name, in upper or lower case; of a name like "5 - five" either half will do.

    Raises UserError for an unknown one.
    """
    found = [i for i, known in enumerate(names) if name.lower() in (known.lower(), *known.lower().split(" - "))]
    found = [i for i in found if names[i] == name] or found
    if not found:
        raise UserError(f"there is no label {name!r}{nearest(name, names)}")
    return found[0]


def takes(run: Run) -> str:
    """What the prior is told, in words."""
    option = {None: "was trained without labels and captions", "label": "takes a --label", "caption": "takes a --text"}
    return f"it {option[run.told]}"
