"""The Hugging Face hub: a model there is an export, and hub:owner/name, or hub:owner/name@revision, is its name as a run.

What is fetched lies in the cache of huggingface_hub, which serves it where there is no network. It is checked as any export is.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipelines.console import DISK, UserError, first_line
from pipelines.runs.exported import LIST, check, files_listed

PREFIX = "hub:"
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def library() -> ModuleType:
    """Raises UserError where it is not installed: only the hub needs it."""
    try:
        import huggingface_hub
        import huggingface_hub.errors  # which the first alone does not
    except ImportError as error:
        raise UserError("the hub needs the library `huggingface_hub`: pip install -e '.[hub]'") from error
    return huggingface_hub


def repository_of(name: str) -> tuple[str, str | None]:
    """owner/name, and the revision where one is named: a branch, a tag or a commit."""
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not NAME.fullmatch(repository):
        raise UserError(f"a model on the hub is named owner/name or owner/name@revision, not {name.removeprefix(PREFIX)!r}")
    return repository, revision or None


def fetched(name: str) -> Path:
    """The folder of a model from the hub, by its name as a run. No file is fetched that its list does not name.

    Raises UserError where it is not there, cannot be fetched, or is not as it was published.
    """
    hub, (repository, revision) = library(), repository_of(name)
    with explained(repository, revision):
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[LIST]))
        if not (folder / LIST).is_file():
            raise UserError(f"{repository} on the hub was not made by python -m pipelines.publish: it has no {LIST}")
        again = f"delete {folder.parent.parent}, and the same command fetches it again"
        names = files_listed(folder, again)
        # By the commit, so that what is fetched now belongs to the list.
        folder = Path(hub.snapshot_download(repository, revision=folder.name, allow_patterns=[LIST, *names]))
    check(folder, again)
    return folder


def publish(folder: Path, repository: str, folders: Iterable[str], private: bool = False) -> str:
    """Make an export a model on the hub, or the next version of one. Returns the commit's name.

    folders: those that any export may have; what the hub has of an earlier version in them is deleted. Raises UserError where
    the hub cannot be reached, or does not let this user write there.
    """
    api = library().HfApi()
    with explained(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            delete_patterns=[f"{name}/*" for name in folders],
            commit_message="Publish with two-stage-latent-prior",
        )
    return str(commit.oid)


@contextmanager
def explained(repository: str, revision: str | None = None) -> Iterator[None]:
    """What the library raises, as a sentence."""
    errors = library().errors
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} on the hub has no revision {revision!r}: name another after the @, or none") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no {repository} on the hub, or it is not open to you: check the name, or log in with hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{repository} cannot be a name on the hub ({first_line(error)})") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("the hub does not know you: log in with hf auth login") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"the hub cannot be reached, and the cache holds no whole copy of {repository}: run the same command again with a"
            " network connection"
        ) from error
    except (errors.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = "log in with hf auth login, as someone who may" if refused else "run the same command again later"
        raise UserError(f"the request to the hub failed ({first_line(error)}): {remedy}") from error
