"""The Hub, asked once, before any download: what it says tells a wrong name from a missing token or network."""

import datasets
import huggingface_hub
from huggingface_hub import errors

from common.cli import UserError

OFFLINE = (
    "is in no folder here and not in the cache, and the Hub cannot be reached. Three ways out: one run with a network "
    "fills the cache; --model and --dataset with local files; --demo"
)


def check_hub(name: str, revision: str | None, kind: str) -> None:
    """Raise UserError where the Hub says that it does not have `name` at `revision`, or not for this user.
    Where the Hub does not answer within 10 seconds, loading takes the cache alone from here on: by itself it would
    try for half a minute before it says that there is no network. kind: "model" or "dataset"."""
    token = "" if huggingface_hub.get_token() else "; no token was found"
    log_in = f"log in with `hf auth login` or set HF_TOKEN{token}"
    reasons = {
        errors.GatedRepoError: f"--{kind} {name}: wants its terms accepted on its page on the Hub; then {log_in}",
        errors.RevisionNotFoundError: f"--{kind}_revision {revision}: {name} has no such commit, tag or branch",
        errors.RepositoryNotFoundError: f"--{kind} {name}: the Hub has no such {kind}; if it is private, {log_in}",
        errors.HFValidationError: f"--{kind} {name}: is no folder here, and no name that the Hub could have",
    }
    try:
        huggingface_hub.HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
    except tuple(reasons) as error:
        raise UserError(reasons[type(error)]) from error
    except (errors.HTTPError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise UserError(f"--{kind} {name}: the Hub does not accept the token; {log_in}") from error
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
