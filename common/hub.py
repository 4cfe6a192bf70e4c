"""The Hub, asked once: loading by name tries for half a minute before it says that there is no network."""

import warnings

import datasets
import huggingface_hub

OFFLINE = (
    "is in no folder here, not in the cache, and the Hub does not have it or cannot be reached. Three ways out: one "
    "run with a network fills the cache; --model and --dataset with local files; --demo"
)


def prefer_cache_without_network(name: str, revision: str | None, kind: str) -> None:
    """Load from the cache alone from here on, unless the Hub says within 10 seconds that it has `name`.

    kind: "model" or "dataset".
    """
    try:
        huggingface_hub.HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
    except Exception:  # the errors of huggingface_hub's HTTP library, which changes with its version
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        warnings.filterwarnings("ignore", "Could not find a config file")  # PEFT's, at every save without the Hub
