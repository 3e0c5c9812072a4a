"""What a repository holds at a revision."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError

from runner.hub.client import Client, Failed
from runner.hub.jobs import Failure, File, Job, Listing
from runner.hub.needs import kinds_of, lacking, needed

_DIGEST = r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}"
"""Nothing else becomes the name of a file."""


def listing(client: Client, job: Job) -> Listing:
    """Ask the hub. Raises Failed, also where the repository cannot be what the job wants of it."""
    try:
        info = client.patiently(
            job, lambda: client.api.model_info(job.repo, revision=job.revision, files_metadata=True, timeout=20.0)
        )
    except HFValidationError as error:
        raise Failed(client.explain(job, error)) from error
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    kinds = job.kinds or kinds_of(siblings)
    if why := lacking(list(siblings), kinds):
        wrong_kind = why in ("it holds a model", "it holds an adapter")
        hint = (
            "write it where such a source belongs"
            if wrong_kind
            else "take a conversion, such as one of mlx-community, or convert it with mlx_lm.convert"
        )
        raise Failed(Failure(job.repo, job.revision, "E807", f"{job} cannot be served: {why}", hint))
    files = []
    for name in needed(siblings, kinds, code=job.code):
        sibling = siblings[name]
        lfs = sibling.lfs
        digest = f"sha256:{lfs.sha256}" if lfs is not None else f"git:{sibling.blob_id}"
        files.append(File(name, (lfs.size if lfs is not None else sibling.size) or 0, digest))
    named = all(re.fullmatch(_DIGEST, file.digest) for file in files)
    if not named or not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        message = f"{job} cannot be had: the hub lists its files without digests"
        raise Failed(Failure(job.repo, job.revision, "E806", message, "check HF_ENDPOINT"))
    return Listing(info.sha, kinds, files)
