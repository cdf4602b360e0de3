"""To the Hub and back: what is pushed from one machine loads on another, by the real client over real HTTP."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_python
from fresh_process import Machine
from hub_server import HubServer
from phi3_embed.processing_phi3_embed import Phi3EmbedImageProcessor
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from test_finetune import small_head
from test_loading import EMBED, MODULES

PAGE = (ROOT / "docs" / "hub.md").read_text()
WEIGHTS = "model.safetensors"

# What a machine does that has run EMBED.
PUSH = """
processor = AutoProcessor.from_pretrained(name, **options)
model.push_to_hub(sys.argv[1], private=True)
processor.push_to_hub(sys.argv[1])
"""
CHANGE = """
import torch
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1.5)
print(json.dumps(model(**inputs).last_hidden_state.sum(-1).tolist()))
"""
CODE_VERSION = "print(getattr(type(model), 'version', 'old'))"
NEW_CODE = (ROOT / "modeling_phi3_embed.py").read_bytes() + b'\nPhi3EmbedModel.version = "new"\n'


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def author(hub, tmp_path_factory):
    """A machine that may write."""
    home = tmp_path_factory.mktemp("author")
    with Machine(home, **hub.environment(home)) as machine:
        yield machine


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """Another machine, with a cache of its own and without a token."""
    home = tmp_path_factory.mktemp("stranger")
    with Machine(home, **hub.environment(home, token="")) as machine:
        yield machine


@pytest.fixture(scope="module")
def folder(repository):
    return Path(repository)


@pytest.fixture(scope="module")
def numbers(author, folder):
    """What the model of `folder` computes."""
    return author(EMBED, folder, "{}")


@pytest.fixture(scope="module")
def pushed(author, folder, numbers):
    author(EMBED, folder, "{}")
    author(PUSH, "someone/pushed")
    return "someone/pushed"


def scaled(weights):
    return to_bytes({name: weight * 1.5 for name, weight in load(weights).items()}, {"format": "pt"})


# Push, and load elsewhere


def test_another_machine_loads_what_was_pushed(hub, pushed, numbers, tmp_path):
    hub.log.clear()
    assert run_python(EMBED, pushed, "{}", **hub.environment(tmp_path, hub.read_token)) == numbers
    files = hub.files(pushed)
    assert hub.repos[pushed].private and len(hub.repos[pushed].commits) == 3  # the new repo's, model, processor
    assert hub.bytes_sent(WEIGHTS) == len(files[WEIGHTS])
    for module in MODULES:
        assert files[module] == (ROOT / module).read_bytes()


def test_a_model_of_the_hub_that_is_changed_and_pushed_again_keeps_its_code(hub, pushed, author, stranger):
    author(EMBED, pushed, "{}")
    changed = author(CHANGE)
    author(PUSH, "someone/changed")
    assert stranger(EMBED, "someone/changed", json.dumps({"token": hub.read_token})).splitlines()[1] == changed.strip()
    files = hub.files("someone/changed")
    for module in MODULES:
        assert files[module] == (ROOT / module).read_bytes()
    # Nothing in it refers to the repo that it came from.
    assert not [path for path, content in files.items() if path.endswith(".json") and b"someone/" in content]


def test_a_head_is_pushed_and_comes_back_in_a_pipeline(hub, author, stranger, tmp_path):
    head = small_head()
    head.save_pretrained(tmp_path)
    Phi3EmbedImageProcessor(num_crops=4, size={"height": 56, "width": 56}, num_img_tokens=4).save_pretrained(tmp_path)
    author(
        """
from transformers import AutoImageProcessor, AutoModelForImageClassification
for auto in AutoModelForImageClassification, AutoImageProcessor:
    auto.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("someone/head")
""",
        tmp_path,
    )
    classify = """
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1], trust_remote_code=True)
print(json.dumps(classify(Image.linear_gradient("L"))))
"""
    assert stranger(classify, "someone/head") == author(classify, tmp_path)
    assert {guess["label"] for guess in json.loads(stranger(classify, "someone/head"))} == {"cat", "dog", "bird"}


def test_an_adapter_is_pushed_alone_and_comes_back_over_its_base(hub, folder, author, stranger):
    hub.add_repo("someone/base", folder)
    author(
        """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel
base = AutoModel.from_pretrained("someone/base", trust_remote_code=True)
adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
adapted.push_to_hub("someone/adapter")
"""
    )
    assert set(hub.files("someone/adapter")) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert WEIGHTS not in hub.files("someone/adapter")
    load = """
from peft import PeftModel
from transformers import AutoModel
base = AutoModel.from_pretrained("someone/base", trust_remote_code=True)
adapted = PeftModel.from_pretrained(base, "someone/adapter")
"""
    embed = """
import torch
images = {"pixel_values": torch.ones(1, 2, 3, 56, 56), "image_sizes": [(56, 56)]}
with torch.no_grad():
    print(adapted(**images).pooler_output.tolist())
"""
    wanted = author(embed)
    stranger(load)
    assert stranger(embed) == wanted
    stranger("adapted = adapted.unload()")
    assert stranger(embed) != wanted


def test_the_pages_way_is_one_commit_that_loads_by_its_hash(hub, tmp_path):
    repo_id = re.search(r'"(someone/[^"]+)"', PAGE)[1]
    (tmp_path / repo_id.partition("/")[2]).mkdir()
    (tmp_path / repo_id.partition("/")[2] / "README.md").write_text("---\nlicense: mit\n---\nmy card\n")
    before = """
import os, sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
weights = model.state_dict()
os.chdir(sys.argv[2])
"""
    after = """
assert all(map(lambda name: model.state_dict()[name].equal(weights[name]), weights))
print(commit)
"""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    commit = run_python(before + "\n".join(blocks) + after, ROOT, tmp_path, **hub.environment(tmp_path))
    assert commit.splitlines()[-1] == hub.head(repo_id)
    assert len(hub.repos[repo_id].commits) == 2  # the Hub's own, which creates the repo, and ours
    files = hub.files(repo_id)
    assert files.keys() >= {"README.md", "config.json", WEIGHTS, "processor_config.json", "tokenizer.json", *MODULES}
    assert b"my card" in files["README.md"]


def test_weights_of_an_earlier_push_are_removed_by_the_pages_way_alone(hub, folder, author, stranger, numbers):
    for repo_id in ("someone/plain", "someone/clean"):
        hub.add_repo(repo_id, folder)
    author(EMBED, folder, "{}")
    changed = author(CHANGE)
    author('model.push_to_hub("someone/plain", max_shard_size="50KB")')
    assert stranger(EMBED, "someone/plain", "{}") == numbers  # the old weights, beside the new ones
    author(
        """
from huggingface_hub import HfApi
model.save_pretrained("sharded", max_shard_size="50KB")
HfApi().upload_folder(repo_id="someone/clean", folder_path="sharded", delete_patterns=sys.argv[1])
""",
        re.search(r'delete_patterns="(.*?)"', PAGE)[1],
    )
    assert WEIGHTS not in hub.files("someone/clean")
    assert stranger(EMBED, "someone/clean", "{}").splitlines()[1] == changed.strip()


def test_a_push_keeps_the_card_that_is_there(hub, folder, author, pushed):
    hub.add_repo("someone/card", folder)
    hub.commit("someone/card", {"README.md": b"---\nlicense: mit\n---\nmy card\n"})
    author(CHANGE)
    author(PUSH, "someone/card")
    assert hub.files("someone/card")["README.md"] == b"---\nlicense: mit\n---\nmy card\n"


# Revisions


def test_a_push_to_a_branch_leaves_main_alone(hub, folder, author, pushed, stranger, numbers):
    hub.add_repo("someone/branched", folder)
    changed = author(CHANGE)
    author('model.push_to_hub("someone/branched", revision="trial")')
    assert stranger(EMBED, "someone/branched", "{}") == numbers
    assert stranger(EMBED, "someone/branched", '{"revision": "trial"}').splitlines()[1] == changed.strip()


def test_branch_tag_and_commit_give_the_old_model_after_main_has_moved(hub, folder, author, stranger, numbers):
    old = hub.add_repo("someone/moved", folder)
    author(
        """
from huggingface_hub import HfApi
HfApi().create_tag("someone/moved", tag="v1.0")
HfApi().create_branch("someone/moved", branch="of/2025")
"""
    )
    weights = hub.files("someone/moved")[WEIGHTS]
    hub.commit("someone/moved", {WEIGHTS: scaled(weights), "modeling_phi3_embed.py": NEW_CODE})
    moved = stranger(EMBED, "someone/moved", "{}")
    assert moved != numbers and stranger(CODE_VERSION) == "new\n"
    for revision in ("v1.0", "of/2025", old):
        assert stranger(EMBED, "someone/moved", json.dumps({"revision": revision})) == numbers
        assert stranger(CODE_VERSION) == "old\n"
    assert stranger(EMBED, "someone/moved", json.dumps({"code_revision": old})) == moved
    assert stranger(CODE_VERSION) == "old\n"


def test_code_in_another_repo_is_pinned_by_code_revision_alone(hub, folder, stranger):
    code = hub.add_repo("someone/code", {module: folder / module for module in MODULES})
    hub.commit("someone/code", {"modeling_phi3_embed.py": NEW_CODE})
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {auto: f"someone/code--{name}" for auto, name in config["auto_map"].items()}
    files = {"config.json": json.dumps(config).encode(), WEIGHTS: folder / WEIGHTS}
    commit = hub.add_repo("someone/weights", files)
    load = """
model = AutoModel.from_pretrained("someone/weights", trust_remote_code=True, **json.loads(sys.argv[1]))
"""
    stranger(EMBED, folder, "{}")
    stranger(load, json.dumps({"revision": commit}))
    assert stranger(CODE_VERSION) == "new\n"
    stranger(load, json.dumps({"revision": commit, "code_revision": code}))
    assert stranger(CODE_VERSION) == "old\n"
    # The commit of the weights for both, as for a repo that carries its code: an error, not some other code.
    with pytest.raises(RuntimeError, match=f"{commit}.*is not a valid git identifier"):
        stranger(load, json.dumps({"revision": commit, "code_revision": commit}))


# Tokens


@pytest.mark.parametrize(
    "access, token, message",
    [
        ("private", False, "If this is a private repository"),
        ("private", "hf_wrong", "Invalid credentials"),
        ("gated", False, "gated repo"),
    ],
)
def test_reading_without_the_right_token_is_an_error_that_says_so(access, token, message, hub, folder, stranger):
    hub.add_repo(f"someone/{access}", folder, **{access: True})
    with pytest.raises(RuntimeError, match=message):
        stranger(EMBED, f"someone/{access}", json.dumps({"token": token}))
    stranger(EMBED, f"someone/{access}", json.dumps({"token": hub.read_token}))


@pytest.mark.parametrize(
    "owner, token, message",
    [
        ("someone", False, "401 Unauthorized"),
        ("someone", "hf_wrong", "Invalid credentials"),
        ("someone", "read", "403 Forbidden"),
        ("microsoft", "write", "403 Forbidden"),
    ],
)
def test_a_push_without_the_right_token_is_an_error_and_writes_nothing(
    owner, token, message, hub, folder, author, pushed
):
    token = {"read": hub.read_token, "write": hub.token}.get(token, token)
    hub.add_repo(f"{owner}/existing", folder)
    before = hub.head(f"{owner}/existing"), set(hub.repos), set(hub.objects)
    author(CHANGE)
    for repo_id in (f"{owner}/existing", f"{owner}/absent"):
        for what in ("model", "processor"):
            with pytest.raises(RuntimeError, match=message):
                author(f"{what}.push_to_hub({repo_id!r}, token={token!r})")
    assert (hub.head(f"{owner}/existing"), set(hub.repos), set(hub.objects)) == before


# Faults of server and network


@pytest.fixture
def repo_id(hub, folder):
    """A repo of `folder` for one test, which has to meet all the faults that it orders."""
    name = f"someone/repo-{len(hub.repos)}"
    hub.add_repo(name, folder)
    yield name
    left = [fault for fault in hub.faults if fault.times]
    hub.faults.clear()
    assert not left


@pytest.mark.parametrize(
    "pattern, kind",
    [
        (r"HEAD .*/config\.json", "503"),
        (r"GET /repos/.*model\.safetensors", "cut"),
        (r"GET /repos/.*model\.safetensors", "drop"),
        (r"GET .*/modeling_phi3_embed\.py", "cut"),
    ],
)
def test_the_client_tries_again_and_loads_whole_files(pattern, kind, hub, repo_id, stranger, numbers):
    hub.fail(pattern, kind=kind, at=10_000)
    assert stranger(EMBED, repo_id, "{}") == numbers


@pytest.mark.parametrize(
    "pattern, kind, message",
    [
        (r"GET /repos/.*model\.safetensors", "503", "503 Service Unavailable"),
        (r"HEAD .*/model\.safetensors", "drop", "Can't load the model"),
        (r"GET .*/processing_phi3_embed\.py", "503", "503 Service Unavailable"),
        (r"GET .*/tokenizer\.json", "503", "503 Service Unavailable"),
    ],
)
def test_where_loading_fails_nothing_half_is_kept(pattern, kind, message, hub, repo_id, stranger, numbers):
    hub.fail(pattern, kind=kind)
    with pytest.raises(RuntimeError, match=message):
        stranger(EMBED, repo_id, "{}")
    assert stranger(EMBED, repo_id, "{}") == numbers


def test_a_wrong_byte_loads_and_is_found_by_the_check_that_the_page_names(hub, repo_id, folder, stranger, numbers):
    hub.fail("GET /repos/", kind="flip", at=100_003)
    assert stranger(EMBED, repo_id, "{}") != numbers
    said = re.search(r"hf\s+cache\s+verify\s+\S+", PAGE)[0].split()[1:-1]
    verify = [Path(sys.executable).with_name("hf"), *said, repo_id]
    environment = os.environ | hub.environment(stranger.home)
    done = subprocess.run(verify, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and WEIGHTS in done.stdout + done.stderr
    done = subprocess.run([*verify, "--local-dir", folder], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "pattern, kind",
    [("POST .*/preupload/", "503"), ("POST .*/objects/batch", "503"), ("PUT /repos/", "503"), ("PUT /repos/", "cut")],
)
def test_a_push_is_tried_again(pattern, kind, hub, repo_id, author, pushed, stranger):
    changed = author(CHANGE)
    hub.fail(pattern, kind=kind, at=10_000)
    author("model.push_to_hub(sys.argv[1])", repo_id)
    assert stranger(EMBED, repo_id, "{}").splitlines()[1] == changed.strip()


@pytest.mark.parametrize(
    "pattern, kind, message",
    [
        ("PUT /repos/", "flip", f"Error while uploading '{WEIGHTS}'"),
        ("POST .*/commit/", "503", "503 Service Unavailable"),
        ("POST .*/commit/", "drop", "Server disconnected"),
    ],
)
def test_a_push_that_fails_leaves_the_old_model_and_can_be_repeated(
    pattern, kind, message, hub, repo_id, author, pushed, stranger, numbers
):
    changed = author(CHANGE)
    hub.fail(pattern, kind=kind)
    with pytest.raises(RuntimeError, match=message):
        author("model.push_to_hub(sys.argv[1])", repo_id)
    assert stranger(EMBED, repo_id, "{}") == numbers
    author("model.push_to_hub(sys.argv[1])", repo_id)
    assert stranger(EMBED, repo_id, "{}").splitlines()[1] == changed.strip()


def test_a_push_whose_answer_is_lost_is_whole_and_not_made_twice(hub, repo_id, author, pushed, stranger):
    changed = author(CHANGE)
    hub.fail("POST .*/commit/", kind="lost")
    with pytest.raises(RuntimeError, match="Server disconnected"):
        author("model.push_to_hub(sys.argv[1])", repo_id)
    assert stranger(EMBED, repo_id, "{}").splitlines()[1] == changed.strip()
    commit = hub.head(repo_id)
    author("model.push_to_hub(sys.argv[1])", repo_id)
    assert hub.head(repo_id) == commit


def test_a_first_push_that_fails_leaves_a_repo_that_does_not_load(hub, repo_id, author, pushed, stranger):
    hub.fail("POST .*/commit/")
    with pytest.raises(RuntimeError, match="503 Service Unavailable"):
        author("model.push_to_hub(sys.argv[1])", f"{repo_id}-new")
    with pytest.raises(RuntimeError, match="Unrecognized model"):
        stranger(EMBED, f"{repo_id}-new", "{}")
