"""The comparison with kvpress, but for kvpress itself: what is handed over, scores, tables, the other process."""

import json
import stat
import sys

import pytest
import torch
from transformers import DynamicCache

from eval.kvpress.budgets import DEFAULT, EXACT, NAMES, OURS, THEIRS, jobs
from eval.kvpress.run import Plan, Reference, run
from eval.kvpress.scoring import check_ids, compression_ratio, score
from eval.kvpress.table import tables, whole
from eval.kvpress.texts import LOOKUPS, NEEDLES, make_texts
from eval.plain_caches import copied, held_bytes
from eval.records import Folder

pytest_plugins = ["tests.eval_fixtures"]

# The other side, as far as the protocol goes: it tells its versions, and answers each text with a line a cell.
FAKE = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    print(json.dumps(dict(python="3", kvpress="0.5.5", transformers="5.2.0")))
    sys.exit()
for number, line in enumerate(sys.stdin):
    if number == {lines}:
        sys.exit(3)
    asked = json.loads(line)
    answers = [dict(nll=float(len(question["answer_ids"])), found=False) for question in asked["text"]["questions"]]
    for cell in asked["cells"]:
        print(json.dumps(dict(cell=cell["name"], dropped=0.5, answers=answers, seconds=1.0, stored_tokens=9,
                              memory_bytes=1000, held_bytes=4000)), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    def make(lines=1000):
        path = tmp_path / "python"
        path.write_text(FAKE.format(python=sys.executable, lines=lines))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


@pytest.fixture(scope="module")
def texts(tokenizer):
    return make_texts(tokenizer, 400, 2, 2)


def encoded_by_kvpress(tokenizer, text):
    """Encode a text and questions as its pipeline does: the template is cut where the context ends."""
    mark = "#" * 2000
    message = [{"role": "user", "content": text.context + mark}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    context, tail = rendered.split(mark)

    def encode(part):
        return tokenizer.encode(part, return_tensors="pt", add_special_tokens=False)

    asked = [encode(each.question + tail + each.lead) for each in text.questions]
    return {"context_ids": encode(context), "questions_ids": asked}


def test_their_pipeline_reads_the_same_tokens(tokenizer, texts):
    for text in texts:
        given = json.loads(json.dumps({**vars(text), "questions": [vars(each) for each in text.questions]}))
        check_ids(encoded_by_kvpress(tokenizer, text), given)
        given["questions"][1]["question_ids"][-1] += 1
        with pytest.raises(ValueError, match=f"{text.task}.*differently"):
            check_ids(encoded_by_kvpress(tokenizer, text), given)


def test_every_answer_is_in_the_text(tokenizer, texts):
    assert [text.task for text in texts] == [NEEDLES, LOOKUPS, NEEDLES, LOOKUPS]
    for text in texts:
        assert len(text.questions) == (4 if text.task == NEEDLES else 3)
        for each in text.questions:
            assert tokenizer.decode(each.answer_ids).strip() in text.body
            assert tokenizer.decode(text.context_ids).endswith(text.context)


def test_texts_differ_and_stay_the_same(tokenizer, texts):
    assert len({text.prompt_hash for text in texts}) == len(texts)
    assert make_texts(tokenizer, 400, 2, 2) == texts


def test_score_is_the_loss_and_whether_all_tokens_are_the_likeliest():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    right, wrong = score(logits, torch.tensor([0, 1])), score(logits, torch.tensor([0, 2]))
    expected = -logits.log_softmax(-1)[[0, 1], [0, 1]].mean()
    assert right["found"] and right["nll"] == pytest.approx(float(expected))
    assert not wrong["found"] and wrong["nll"] > right["nll"]


def test_what_a_press_keeps_has_the_bytes_that_were_asked_for():
    without = {None: 1000, 4: 280}
    assert compression_ratio(None, None, without) == 0
    assert (1 - compression_ratio(0.17, None, without)) * 1000 == pytest.approx(170)
    assert (1 - compression_ratio(0.17, 4, without)) * 280 == pytest.approx(170)
    with pytest.raises(ValueError, match="bits=4"):
        compression_ratio(0.3, 4, without)


def test_presses_get_the_bytes_of_the_cell_they_stand_beside():
    held = {cell.name: 1000 if cell.name == EXACT else 100 + number for number, cell in enumerate(OURS)}
    named = {job["name"]: job for job in jobs(held)}
    assert len(named) == len(THEIRS)
    leading = next(cell.name for cell in OURS if cell.budget == DEFAULT)
    for cell in THEIRS:
        share = named[cell.name]["share"]
        assert (share is None) == (cell.press is None)
        if cell.budget == DEFAULT:
            assert share == held[leading] / 1000


def test_a_copied_cache_grows_alone():
    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    twin = copied(cache)
    twin.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (3, 4)
    assert held_bytes(cache.layers) == 2 * 2 * 3 * 4 * 4


def records_of(losses, task=NEEDLES):
    """Records of all cells on a text a loss; each cell loses a bit more than the one before."""
    return [
        {
            "task": task,
            "sample": sample,
            "method": name,
            "scores": {"nll": loss + 0.1 * NAMES.index(name)},
            "answers": [{"nll": loss, "found": name == EXACT}],
            "memory_bytes": 100 if name == EXACT else 25,
            "held_bytes": 100 if "kvzip" in name or name == EXACT else 25,
            "seconds": {"compress": 1.0},
        }
        for sample, loss in enumerate(losses)
        for name in NAMES
    ]


def test_tables_say_what_is_kept_what_is_held_and_what_differs():
    text = tables(records_of([1.0, 2.0, 3.0, 4.0]))
    kvzip = next(line for line in text.splitlines() if "kvpress: kvzip + quanto" in line)
    assert "25.0 % | 100.0 %" in kvzip and "worse" in kvzip and "0 of 4" in kvzip
    exact = next(line for line in text.splitlines() if "wildcat_kv: exact" in line)
    assert "4 of 4" in exact and "worse" not in exact
    assert LOOKUPS not in text


def test_a_text_that_was_interrupted_is_left_out():
    begun = records_of([1.0, 2.0, 3.0, 9.0])[:-1]
    assert whole(begun) == {(NEEDLES, 0), (NEEDLES, 1), (NEEDLES, 2)}
    again = [*begun, *(record for record in records_of([1.0, 2.0, 3.0, 9.0]) if record["sample"] == 3)]
    assert tables(begun) == tables(records_of([1.0, 2.0, 3.0]))
    assert tables(again) == tables(records_of([1.0, 2.0, 3.0, 9.0]))


def test_both_sides_end_in_one_folder_and_can_be_gone_on_with(fake, tiny_folder, tmp_path):
    folder, here = tmp_path / "run", str(tiny_folder)
    with pytest.raises(RuntimeError, match="status 3"):
        run(Plan(fake(lines=1), here, 400, 1, 1, dtype="float32"), folder, command="c", resume=False)
    first = Folder(folder).records()
    assert len(whole(first)) == 1
    run(Plan(fake(), here, 400, 1, 1, dtype="float32"), folder, command="c", resume=True)
    records = Folder(folder).records()
    assert [record["method"] for record in records] == NAMES * 2
    assert records[: len(NAMES)] == first[: len(NAMES)]
    assert Folder(folder).manifest["reference_versions"]["kvpress"] == "0.5.5"
    assert "kvpress 0.5.5" in (folder / "summary.md").read_text()
    smaller = {record["method"]: record["memory_bytes"] for record in records[: len(OURS)]}
    assert smaller["bytes_9"] < smaller["the default"] < smaller["all tokens in 4 bits"] < smaller[EXACT]


def test_an_environment_without_kvpress_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"reference=.*make compare-kvpress"):
        run(Plan(tmp_path / "nothing"), tmp_path / "run", command="c", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_process_that_ends_early_says_with_which_status(fake, tiny_folder, texts):
    with Reference(Plan(fake(lines=0), str(tiny_folder))) as reference, pytest.raises(RuntimeError, match="status 3"):
        list(reference.measure(texts[0], [{"name": "a"}]))
