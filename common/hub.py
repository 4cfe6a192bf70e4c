"""The Hub, asked once, before any download: what it says tells a wrong name from a missing token or network."""

import warnings

import datasets
import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from common.cli import UserError

OFFLINE = (
    "is in no folder here and not in the cache, and the Hub cannot be reached. Three ways out: one run with a network "
    "fills the cache; --model and --dataset with local files; --demo"
)


def check_hub(name: str, revision: str | None, kind: str) -> None:
    """Raise UserError where the Hub says that it does not have `name` at `revision`, or not for this user.

    Where the Hub does not answer within 10 seconds, loading takes the cache alone from here on: by itself it would
    try for half a minute before it says that there is no network. kind: "model" or "dataset".
    """
    log_in = "log in with `hf auth login` or set HF_TOKEN" + " (no token was found)" * (
        not huggingface_hub.get_token()
    )
    try:
        huggingface_hub.HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
    except GatedRepoError as error:
        raise UserError(
            f"--{kind} {name}: asks its users to accept terms on its page on the Hub; then {log_in}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"--{kind}_revision {revision}: {name} has no such commit, tag or branch") from error
    except HFValidationError as error:
        raise UserError(f"--{kind} {name}: is no folder here, and no name that the Hub could have") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"--{kind} {name}: the Hub has no such {kind}; if it is a private one, {log_in}") from error
    except (HTTPError, OSError):
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        warnings.filterwarnings("ignore", "Could not find a config file")  # PEFT's, at every save without the Hub
