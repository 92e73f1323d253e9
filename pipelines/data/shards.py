"""The user's own images in WebDataset shards, which are tar files."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipelines import processes
from pipelines.console import UserError, counted, say
from pipelines.data.captions import usable_text
from pipelines.data.images import ImageSet, Splits
from pipelines.data.layout import listed, some
from pipelines.data.own import FEWEST_IMAGES, OwnImages, labels_of
from pipelines.data.reading import Stored
from pipelines.data.shard_index import Index, index_of, index_of_shard
from pipelines.data.tars import SplitName, TarFiles
from pipelines.files import digest_of


@dataclass(frozen=True)
class Shards(OwnImages):
    """WebDataset shards: tar files of samples {jpg or png, and so on; cls, a label; txt, or json with `caption`, a caption}.

    Labels and captions are used where every sample has one. Samples are read where they lie, in any order.
    """

    urls: str | None = None
    """shards, as paths or URLs with brace patterns, such as data/train-{000..099}.tar; several patterns are joined by ::"""
    test_urls: str | None = None
    """shards of the test split; by default a share of the samples is held out"""
    cache: Path = Path("data/shards")
    """folder for copies of shards from URLs, and for indices of shards that cannot be written beside them"""

    def load(self, report: Path | None = None) -> Splits:
        """report: file to name the unreadable images in."""
        patterns = self.patterns()
        self.check()
        found = [self.samples(pattern) for pattern in patterns.values()]
        texts = [(index.keys, [*map(text_of, index.keys, index.annotations["cls"])]) for _, index in found]
        labels, label_names = labels_of(texts, "samples", "cls")
        sets = {}
        for split, (paths, index), part_labels in zip(patterns, found, labels):
            files = TarFiles(paths, index.keys, index.shards, index.offsets, index.sizes)
            images = Stored(files, self.image_shape, self.background)
            sets[split] = ImageSet(images, part_labels, captions_in(index))
        return self.splits(sets, " and ".join(patterns.values()), label_names, report)

    def index_together(self) -> None:
        """Copy and index the shards as `load` does, but by all processes together, each some of them."""
        patterns = self.patterns()
        self.check()
        urls = dict.fromkeys(url for pattern in patterns.values() for url in urls_of(pattern))
        split = split_name()
        processes.shared(lambda url: index_of_shard(self.local(url), split, self.cache), [*urls], "indexing the shards", "shards")

    def patterns(self) -> dict[str, str]:
        """The patterns of URLs, by the split that they are for, or `all`."""
        if self.urls is None:
            raise UserError("the preset webdataset needs your shards: --data.urls 'data/train-{000..099}.tar'")
        return {"all": self.urls} if self.test_urls is None else {"train": self.urls, "test": self.test_urls}

    def local(self, url: str) -> str:
        """The local file of a shard, copied where it is not there."""
        if not REMOTE.match(url):
            return url.removeprefix("file://").removeprefix("file:")
        from webdataset.cache import FileCache

        try:
            return FileCache(str(self.cache), url_to_name=cache_name, validator=None).get_file(url)
        except (OSError, ValueError) as error:
            raise UserError(f"the shard {url} cannot be copied to {self.cache}/ ({error})") from error

    def samples(self, pattern: str) -> tuple[list[str], Index]:
        """The local files of a pattern, and what is in them."""
        paths = [self.local(url) for url in urls_of(pattern)]
        left_out: Counter[str] = Counter()
        index = index_of(paths, split_name(), left_out, self.cache)
        if left_out:
            say(f"left out of {pattern}: {listed(left_out)}")
        if index.repeated:
            repeated = counted(index.repeated, "sample")
            say(f"{pattern} holds {repeated} whose name is that of another in the same shard: all are used")
        if len(index) < FEWEST_IMAGES:
            raise UserError(f"{pattern} holds {counted(len(index), 'image')}; at least {FEWEST_IMAGES} are needed")
        return paths, index


NEEDS_WEBDATASET = "shards need the library `webdataset`: pip install -e '.[webdataset]'"
REMOTE = re.compile(r"(?!file:)\w{2,}:")  # a URL, or a pipe: command


def urls_of(pattern: str) -> list[str]:
    """The shards of a pattern. Raises UserError where it names none, or the library is missing."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise UserError(NEEDS_WEBDATASET) from error
    try:
        return expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # of braces, or of a variable that is not set
        raise UserError(f"{pattern!r} names no shards ({error}): write it like 'data/train-{{000..099}}.tar'") from error


def split_name() -> SplitName:
    """WebDataset's way to split the name of a member into the key of its sample and its kind."""
    from webdataset.tariterators import base_plus_ext

    return base_plus_ext


def cache_name(url: str) -> str:
    """Shards of one name from several places are several files."""
    return f"{digest_of([url.encode()])}-{re.sub(r'[^A-Za-z0-9.-]+', '-', url)[-100:]}"


def text_of(key: str, content: bytes | None) -> str | None:
    """Raises UserError for a text that is not in UTF-8."""
    try:
        return None if content is None else content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"a text of the sample {key} is not in UTF-8 ({error}): write the shard again with UTF-8") from error


def captions_in(index: Index) -> list[str] | None:
    """What the samples' txt says, or the `caption` of their json; None unless all have one."""
    captions = [caption_in(*of_sample) for of_sample in zip(index.keys, index.annotations["txt"], index.annotations["json"])]
    without = [key for key, caption in zip(index.keys, captions) if caption is None]
    if 0 < len(without) < len(index):
        say(f"no captions: neither txt nor json with one in {len(without)} of {len(index)} samples: {some(without, 3)}")
    return None if without else [caption for caption in captions if caption is not None]


def caption_in(key: str, txt: bytes | None, json_text: bytes | None) -> str | None:
    """Raises UserError for a caption that is no text, or not in UTF-8."""
    if txt is not None:
        return text_of(key, txt)
    if json_text is None:
        return None
    try:
        caption = json.loads(json_text)["caption"]
    except (ValueError, KeyError, TypeError):
        return None
    try:
        return usable_text(caption)
    except UserError as error:
        raise UserError(f"the caption of the sample {key}: {error}") from error
