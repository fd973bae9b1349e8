"""`llm-train list`, and the index of classes that it reads from source text: it agrees with the imported classes."""

import dataclasses
import inspect
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, callbacks

from experiments import names
from experiments.class_paths import import_class
from experiments.help import index, listing, source_text
from lightning_modules.common.cache import cache_root

ROOT = Path(__file__).parents[2]
OWN = [kind for package in index.OWN for kind in index.classes(package) if not kind.name.startswith("_")]
LIBRARIES = [kind for package in ("torch.optim", "lightning.pytorch.callbacks") for kind in index.classes(package)]


def test_every_kind_is_listed_with_names_that_exist(llm_train):
    done = llm_train("list")
    assert done.code == 0, done.err
    for kind in listing.KINDS:
        rows = dict(listing.KINDS[kind].rows())
        assert len(rows) > 4, kind
        shown = llm_train("list", kind)
        alone = shown.out.splitlines()
        assert ("A schedule advances at every optimiser step" in shown.err) == (kind == "schedules")
        assert [line.split("  ")[0] for line in alone] == [*rows]
        assert f"\n{kind}" in f"\n{done.out}"
        if kind in ("experiments", "presets", "studies"):
            assert all(names.find(name) and what for name, what in rows.items())
        elif kind != "topics":
            assert all(inspect.isclass(import_class(path, {})) for path in rows)


def test_what_the_topics_and_experiments_are_comes_from_their_files():
    topics = dict(listing.topics())
    assert {*topics} == {*index.topics()}
    assert all(topics.values())
    assert {name.split("/")[0] for name, _ in listing.KINDS["experiments"].rows()} == {*topics}
    assert {f"{file.parent.name}/{file.stem}" for file in (ROOT / "experiments/trainer").glob("*.yaml")} == {
        name for name, _ in listing.KINDS["presets"].rows()
    }


def test_abstract_and_private_classes_are_not_listed():
    listed = {
        path.rpartition(".")[2]
        for kind in ("modules", "sources", "callbacks")
        for path, _ in listing.KINDS[kind].rows()
    }
    assert not listed & {"Source", "ReviewSource", "ExperimentModule", "ClassifierModule", "Callback", "DrawsAtTheEnd"}
    assert {"TextFiles", "RunCheckpoint", "EarlyStopping"} <= listed


@pytest.mark.parametrize("kind", ["OWN", "LIBRARIES"])
def test_the_arguments_of_a_class_are_those_of_its_constructor(kind):
    differing = {}
    for found in globals()[kind]:
        real = (
            import_class(found.path, {}) if kind == "OWN" else getattr(sys.modules.get(found.module), found.name, None)
        )
        if real is None or "__init__" not in [name for base in real.__mro__[:-1] for name in vars(base)]:
            continue
        parameters = inspect.signature(real.__init__).parameters.values()
        named = [p for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        read = index.parameters(found)
        if missing := {p.name for p in named} - {*read}:
            differing[found.defined] = missing
        elif len(named) == len([*parameters]) - 1 and (more := {*read} - {p.name for p in named}):
            differing[found.defined] = more
        for parameter in named:
            has_default = read[parameter.name].default is not None if parameter.name in read else None
            if not dataclasses.is_dataclass(real) and has_default != (parameter.default is not parameter.empty):
                differing[found.defined] = parameter.name
    assert not differing


def test_arguments_have_the_texts_of_the_docstrings():
    callbacks_of_runs = index.subclasses("lightning.pytorch.callbacks.Callback", "lightning_modules")
    assert len(callbacks_of_runs) > 20
    undocumented = [
        f"{kind.path}.{name}"
        for kind in callbacks_of_runs
        for name, parameter in index.parameters(kind).items()
        if not parameter.help
    ]
    assert undocumented == []
    trainer = index.parameters(index.find("lightning.pytorch.Trainer"))
    assert {*trainer} == {*inspect.signature(Trainer.__init__).parameters} - {"self"}
    assert all(parameter.help for parameter in trainer.values())


def test_a_path_that_a_package_re_exports_leads_to_its_class():
    assert index.find("lightning.pytorch.callbacks.Timer").defined == callbacks.Timer.__module__ + ".Timer"
    assert index.find("torch.optim.AdamW").defined == torch.optim.AdamW.__module__ + ".AdamW"
    assert index.find("torch.optim.Nothing") is None
    assert index.find("package_that_nobody_has.Nothing") is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One"),
        ("What is it? A thing.", "What is it?"),
        ("By A. Author (see x.y). More.", "By A. Author (see x.y)"),
        ("Over\ntwo lines.\n\nMore.", "Over two lines"),
        ("Uses :class:`~a.b.C` and ``x``.", "Uses C and `x`"),
        ("", ""),
    ],
)
def test_the_first_sentence_of_a_text(text, sentence):
    assert index.first_sentence(text) == sentence


def test_a_link_in_the_text_of_an_argument_is_its_words():
    docstring = "Does.\n\nArgs:\n    a: See `the page <https://x.org>`_ and\n        :class:`~b.C`, ``d``.\n"
    assert index.described(docstring) == {"a": "See the page and C, `d`."}


def test_what_is_read_of_a_module_is_kept_in_the_cache_until_the_file_changes(tmp_path, monkeypatch):
    read, file, cache = source_text.read.__wrapped__, tmp_path / "mine.py", cache_root() / "source_text.json"
    file.write_text('class Mine(Base):\n    """One."""\n    def __init__(self, width: int = 1, *more): ...\n')
    with source_text.kept_in_cache():
        parsed = read(file)
    assert parsed.classes["Mine"].functions["__init__"].parameters == [source_text.Parameter("width", "int", "1")]
    kept = cache.read_text()
    with monkeypatch.context() as patch, source_text.kept_in_cache():
        patch.delattr("ast.parse")
        assert read(file) == parsed
    for damaged in ("[]", kept[:-9], '{"made_by": 1}', kept.replace("classes", "class"), kept.replace("made_by", "by")):
        cache.write_text(damaged)
        with source_text.kept_in_cache():
            assert read(file) == parsed
        assert cache.read_text() == kept
    file.write_text("class Other: ...")
    with source_text.kept_in_cache():
        assert [*read(file).classes] == ["Other"]
