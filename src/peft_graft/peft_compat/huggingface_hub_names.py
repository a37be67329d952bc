"""Private names of huggingface_hub: where the cache keeps a repository."""

from .private_names import require_names

require_names("huggingface_hub")

from huggingface_hub.file_download import repo_folder_name

__all__ = ["repo_folder_name"]
