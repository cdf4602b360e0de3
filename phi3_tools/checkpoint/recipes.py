"""
Recipes: which forms, prompts, crops and pooling made the vectors of a checkpoint that was trained to embed.

A recipe is data, a JSON file in `recipes/` or a user's own. Its forms are texts with `{prompt}`, `{text}` and
`{images}` in them; what is written of them is a chat template and the files of sentence-transformers, so that
`SentenceTransformer(folder, trust_remote_code=True)` encodes texts, images, and texts with images.
"""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

from phi3_tools.checkpoint.layout import from_module
from phi3_tools.results import write_text

RECIPES = Path(__file__).parent / "recipes"
MAX_SIZE = 2**16
FORMS = ("text", "image", "text_with_image")
POOLINGS = ("lasttoken", "mean")
# The name of the chat template that holds the forms, beside the one for chats.
TEMPLATE = "embedding"


@dataclass(frozen=True)
class Recipe:
    """
    How a checkpoint embeds.

    Attributes:
        name: the file's, without its ending.
        title, source, note: for the card: what it is, where it is from, what to mind.
        checkpoints: the Hub ids that were trained so.
        text, image, text_with_image: the forms; None where there is none.
        image_tag: what `{images}` has for each image, with its `{number}`.
        without_prompt: what stands for `{prompt}` where none is given, by form.
        prompts: sentence-transformers' prompts, by name; `query` and `document` are those of `encode_query` and
            `encode_document`.
        pooling: `"lasttoken"` of the language model, or `"mean"` over the tokens of an image, without it.
        num_crops: the most crops of an image; None: the checkpoint's own.
    """

    name: str
    title: str
    checkpoints: list[str]
    source: str
    text: str | None
    image: str | None
    text_with_image: str | None
    image_tag: str
    without_prompt: dict[str, str]
    prompts: dict[str, str]
    pooling: str
    num_crops: int | None
    note: str

    def written(self) -> str:
        """The forms, prompts and pooling, a line each."""
        tag = self.image_tag.replace("{number}", "1")
        forms = {name.replace("_", " "): (getattr(self, name) or "none").replace("{images}", tag) for name in FORMS}
        lines = forms | {f"prompt of a {name} by default": text for name, text in self.without_prompt.items()}
        lines |= {f"prompt {name!r}": text for name, text in self.prompts.items()}
        texts = [f"{name}: {json.dumps(text, ensure_ascii=False)}" for name, text in lines.items()]
        return "\n".join([*texts, f"pooling: {self.pooling}, normalised"])


def names() -> list[str]:
    """The recipes that are known by name."""
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def load(name: str) -> Recipe:
    """
    A recipe by its name, or by the path of a JSON file.

    Raises:
        ValueError: there is none, or it is not as a recipe should be; says what is wrong and what is accepted.
    """
    path = RECIPES / f"{name}.json" if name in names() else Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"There is no recipe {name}. Give one of {', '.join(names())}, or a JSON file of your own.")
    with open(path, encoding="utf-8") as file:
        text = file.read(MAX_SIZE + 1)
    try:
        about = json.loads(text) if len(text) <= MAX_SIZE else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{name} must hold a JSON object of at most {MAX_SIZE} characters.")
    known = {field.name for field in fields(Recipe)} - {"name"}
    if about.keys() != known:
        missing, unknown = (
            ", ".join(sorted(keys)) or "nothing" for keys in (known - about.keys(), about.keys() - known)
        )
        raise ValueError(
            f"The recipe {name} must have {', '.join(sorted(known))}. Missing: {missing}. Unknown: {unknown}."
        )
    recipe = Recipe(path.stem, **about)
    for problem in _problems(recipe):
        raise ValueError(f"The recipe {name}: {problem}.")
    return recipe


def _problems(recipe):
    for key in ("title", "source", "image_tag", "note", *FORMS):
        value = getattr(recipe, key)
        if not isinstance(value, str) and not (value is None and key in FORMS):
            yield f"`{key}` is {value!r}, but must be a text"
    for key in ("without_prompt", "prompts"):
        value = getattr(recipe, key)
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            yield f"`{key}` is {value!r}, but must be texts by name"
    if not isinstance(recipe.checkpoints, list) or not all(isinstance(name, str) for name in recipe.checkpoints):
        yield f"`checkpoints` is {recipe.checkpoints!r}, but must be a list of Hub ids"
    if recipe.pooling not in POOLINGS:
        yield f"`pooling` is {recipe.pooling!r}, but must be one of {', '.join(POOLINGS)}"
    most = from_module("processing_phi3_embed.MAX_NUM_CROPS")
    if recipe.num_crops is not None and not (type(recipe.num_crops) is int and 0 <= recipe.num_crops <= most):
        yield f"`num_crops` is {recipe.num_crops!r}, but must be a number of crops up to {most}, or null"
    forms = {name: form for name in FORMS if (form := getattr(recipe, name)) is not None}
    if (recipe.pooling == "mean") == bool(forms):
        yield f"`pooling` is {recipe.pooling!r} with {len(forms)} forms, but `mean` goes without any, `lasttoken` with"
    allowed = {
        "text": {"prompt", "text"},
        "image": {"prompt", "images"},
        "text_with_image": {"prompt", "text", "images"},
    }
    for name, form in forms.items():
        placeholders = set(re.findall(r"\{(\w+)\}", form))
        if placeholders - allowed[name] or not placeholders & {"text", "images"}:
            yield f"`{name}` has {sorted(placeholders)}, but must be of {sorted(allowed[name])}"
    if {"image", "text_with_image"} & forms.keys() and "{number}" not in recipe.image_tag:
        yield f"`image_tag` is {recipe.image_tag!r}, but must have {{number}}"
    for name in recipe.without_prompt:
        if "{prompt}" not in forms.get(name, ""):
            yield f"`without_prompt` names {name!r}, a form that is not there or has no {{prompt}}"
    if recipe.prompts and not any("{prompt}" in form for form in forms.values()):
        yield "`prompts` are given, but no form has {prompt}"


def known_for(checkpoint: str) -> Recipe | None:
    """The recipe of a checkpoint that is known by its Hub id."""
    return next((recipe for recipe in map(load, names()) if checkpoint in recipe.checkpoints), None)


def chat_templates(default: str, recipe: Recipe | None) -> dict[str, str]:
    """The chat templates of a processor, by name: that of chats, and that of a recipe's forms."""
    return {"default": default} | ({TEMPLATE: chat_template(recipe)} if recipe and recipe.pooling != "mean" else {})


def chat_template(recipe: Recipe) -> str:
    """The forms as a chat template: a system message is the prompt, images and texts of the others the rest."""
    collected = """\
{%- set seen = namespace(prompt="", text="", images="", number=0) -%}
{%- for message in messages -%}
  {%- for part in ([{"type": "text", "text": message.content}] if message.content is string else message.content) -%}
    {%- if part.type == "image" -%}
      {%- set seen.number = seen.number + 1 -%}
      {%- set seen.images = seen.images ~ TAG -%}
    {%- elif message.role == "system" -%}
      {%- set seen.prompt = seen.prompt ~ part.text -%}
    {%- else -%}
      {%- set seen.text = seen.text ~ part.text -%}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- if not seen.images and not seen.text.strip() -%}EMPTY
{%- elif not seen.images -%}TEXT
{%- elif not seen.text -%}IMAGE
{%- else -%}BOTH
{%- endif -%}
"""
    replaced = {
        "EMPTY": '{{- raise_exception("A text is empty, so it has no vector. Give words.") -}}',
        "TAG": _expression(recipe.image_tag, {"number": "seen.number"}),
        **{key: _form(recipe, name) for key, name in zip(("TEXT", "IMAGE", "BOTH"), FORMS)},
    }
    return re.sub(r"\b(EMPTY|TAG|TEXT|IMAGE|BOTH)\b", lambda match: replaced[match[0]], collected)


def _form(recipe, name):
    form = getattr(recipe, name)
    if form is None:
        what = name.replace("_", " ")
        return f"{{{{- raise_exception({_literal(f'{recipe.title} has no form for {what}.')}) -}}}}"
    prompt = f"(seen.prompt or {_literal(recipe.without_prompt.get(name, ''))})"
    return f"{{{{- {_expression(form, {'prompt': prompt, 'text': 'seen.text', 'images': 'seen.images'})} -}}}}"


def _expression(form, variables):
    """A form as a Jinja expression: its texts as literals, its placeholders as variables."""
    parts = re.split(r"\{(\w+)\}", form)
    terms = [variables[part] if number % 2 else _literal(part) for number, part in enumerate(parts)]
    return " ~ ".join(term for term in terms if term != '""')


def _literal(text):
    escaped = text.encode("unicode_escape").decode().replace('"', '\\"')
    return f'"{escaped}"'


def write_files(recipe: Recipe, dimension: int, folder: Path) -> None:
    """
    Writes the files by which sentence-transformers takes the last token of what [`chat_template`] writes. It sends
    every input through the template where `modality_config` has `message`. For a mean of image tokens it writes none,
    because that is what a saved model has files for by itself.
    """
    if recipe.pooling == "mean":
        return
    modules = "sentence_transformers.sentence_transformer.modules"
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = {"text": recipe.text, "image": recipe.image, "image+text": recipe.text_with_image}
    processing: dict[str, dict] = {"chat_template": {"chat_template": TEMPLATE}}
    if recipe.num_crops is not None:
        processing["image"] = {"num_crops": recipe.num_crops}
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{modules}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{modules}.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{modules}.Normalize"},
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {name: output for name, form in modalities.items() if form is not None}
            | {"message": output | {"format": "structured"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": processing,
        },
        "1_Pooling/config.json": {"embedding_dimension": dimension, "pooling_mode": recipe.pooling},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "cosine",
            "prompts": recipe.prompts,
            "requirements": from_module("configuration_phi3_embed.SENTENCE_TRANSFORMERS_FILES")[
                "config_sentence_transformers.json"
            ]["requirements"],
        },
    }
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
