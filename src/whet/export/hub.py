"""Uploading an export to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.errors import WhetError


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    api: Any = None,
    **more: Any,
) -> str:
    """Upload a folder to the Hub.

    Args:
        folder: What to upload.
        repo_id: Where to; it is made if it is not there.
        token: Of the Hub.
        private: Whether a new repository is private.
        api: A huggingface_hub.HfApi; None makes one.
        **more: Arguments of `HfApi.upload_folder`.

    Returns:
        The address of the commit.

    Raises:
        WhetError: The Hub refuses it, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = api or HfApi(token=token)
    more.setdefault("commit_message", "Upload model trained with whet")
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        repo = getattr(made, "repo_id", None) or repo_id
        return str(api.upload_folder(folder_path=str(folder), repo_id=repo, **more))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise WhetError(
            f"'{folder}' could not be uploaded to '{repo_id}': {str(error).splitlines()[0]}",
            fix="the folder is whole; check the name and `hf auth login`, then run it again",
        ) from error
