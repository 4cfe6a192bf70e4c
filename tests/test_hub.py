"""What the Hub says is told apart, each in a line of its own; it is asked once, and not for local folders."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import transformers
from conftest import read_reviews
from huggingface_hub import errors

from common.cli import UserError
from common.data import check_hub
from common.model import load_tokenizer

ANSWER, UNAUTHORIZED = (SimpleNamespace(headers={}, request=None, status_code=code) for code in (503, 401))
SAYS = {
    "gated": errors.GatedRepoError("Access to model is restricted", response=ANSWER),
    "unknown": errors.RepositoryNotFoundError("Repository Not Found", response=ANSWER),
    "revision": errors.RevisionNotFoundError("Invalid rev id", response=ANSWER),
    "token": errors.HfHubHTTPError("Invalid credentials in Authorization header", response=UNAUTHORIZED),
    "malformed": errors.HFValidationError("Repo id must use alphanumeric chars"),
    "server": errors.HfHubHTTPError("503 Server Error", response=ANSWER),
    "network": ConnectionError("no route to host"),
}
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the Hub was asked. It answers with SAYS[revision], or that all is well; there is a network."""
    asked = []

    def repo_info(self, name, *, revision, repo_type, timeout):
        asked.append((name, revision, repo_type))
        if revision in SAYS:
            raise SAYS[revision]

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    for offline in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(offline, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("token", [None, "hf_secret"])
@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("gated", f"--{{}} some/name: wants its terms accepted on its page on the Hub; then {LOG_IN}"),
        ("unknown", f"--{{0}} some/name: the Hub has no such {{0}}; if it is private, {LOG_IN}"),
        ("revision", "--{}_revision revision: some/name has no such commit, tag or branch"),
        ("token", f"--{{}} some/name: the Hub does not accept the token; {LOG_IN}"),
        ("malformed", "--{} some/name: is no folder here, and no name that the Hub could have"),
    ],
)
def test_each_refusal_has_a_line_of_its_own(answer, message, kind, token, asked, monkeypatch):
    monkeypatch.setattr("common.data.get_token", lambda: token)
    with pytest.raises(UserError) as error:
        check_hub("some/name", answer, kind)
    missing = "" if token or LOG_IN not in message else "; no token was found"
    assert str(error.value) == message.format(kind) + missing
    assert asked == [("some/name", answer, kind)]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "there is a network"


@pytest.mark.parametrize("answer", ["server", "network", "v1"])
def test_only_a_hub_that_does_not_answer_counts_as_no_network(answer, asked):
    check_hub("some/name", answer, "model")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is (answer != "v1")


def test_a_refusal_ends_the_run_before_any_download(asked):
    with pytest.raises(UserError, match=r"--dataset some/films: the Hub has no such dataset"):
        read_reviews("some/films", "unknown")
    with pytest.raises(UserError, match=r"--model some/model: wants its terms accepted"):
        load_tokenizer("some/model", "gated", 64)


def test_local_folders_need_no_hub(asked, demo):
    read_reviews(str(demo[1]))
    load_tokenizer(str(demo[0]), None, 64)
    assert not asked


def test_a_model_on_the_hub_without_safetensors_is_refused_with_the_way_to_convert_it(asked, demo, monkeypatch):
    for loader in (transformers.AutoConfig, transformers.AutoTokenizer):
        found = loader.from_pretrained(demo[0])
        monkeypatch.setattr(loader, "from_pretrained", lambda name, found=found, **options: found)
    monkeypatch.setattr("common.model.has_file", lambda name, file, revision: file == "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^--model some/model: has no model\.safetensors; python -c .*'some/model'"):
        load_tokenizer("some/model", "v1", 64)
