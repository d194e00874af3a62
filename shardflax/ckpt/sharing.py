"""Getting the folder of a run ready, and proving that all processes see the same one."""

from __future__ import annotations

from shardflax.ckpt.errors import CheckpointFolderError
from shardflax.ckpt.folder import StepFolder
from shardflax.ckpt.rendezvous import Rendezvous, new_token

__all__ = ["get_ready"]

_DOING = "making a manager"


def get_ready(folder: StepFolder, meeting: Rendezvous) -> tuple[str, list[int]]:
    """Prepares a folder; a name for the files of this manager, and the committed steps.

    Removes what killed runs left.  Raises CheckpointFolderError, in each process, if one of them
    cannot use the folder or does not see what process 0 sees.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from shardflax.ckpt.rendezvous import meet
    >>> get_ready(StepFolder(Path(tempfile.mkdtemp(), "run")), meet(timeout=5))[1]
    []
    """
    failure: CheckpointFolderError | None = None
    steps: list[int] = []
    try:
        folder.prepare()
        steps = folder.steps()
    except CheckpointFolderError as error:
        failure = error
    token = new_token()
    if meeting.count > 1:
        token = _check_shared(meeting, folder, failure)
        steps = meeting.agree("steps", steps, _DOING)
    if failure is not None:
        raise failure
    if meeting.primary:
        folder.clean()
    return token, steps


def _check_shared(
    meeting: Rendezvous, folder: StepFolder, failure: CheckpointFolderError | None
) -> str:
    """Process 0 leaves a mark, the others look for it."""
    token = meeting.agree("token", new_token(), _DOING)
    mark = folder.root / f".shared-test-{token}"
    if meeting.primary and failure is None:
        mark.touch()
    meeting.agree("mark", True, _DOING)
    said = meeting.together("shared", {"seen": mark.exists(), "error": str(failure or "")}, _DOING)
    if meeting.primary and failure is None:
        mark.unlink(missing_ok=True)
    if failure is not None:
        raise failure
    broken = {index: report["error"] for index, report in said.items() if report["error"]}
    if broken:
        text = "; ".join(f"process {index}: {error}" for index, error in broken.items())
        raise CheckpointFolderError(folder.root, "another process cannot use it", text)
    blind = [index for index, report in said.items() if not report["seen"]]
    if blind:
        raise CheckpointFolderError(
            folder.root,
            f"processes {', '.join(map(str, blind))} do not see what process 0 writes there",
            "Give a folder on a file system that all hosts share.",
        )
    return token
