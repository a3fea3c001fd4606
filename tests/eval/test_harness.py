"""Benchmarks of lm-eval over compressed contexts: its documents, prompts and scores, from local files or made here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.longbench import metrics as theirs
from transformers import AutoTokenizer, LlamaForCausalLM

from eval import lm_eval_tasks
from eval.cells import Cell
from eval.config import RunConfig
from eval.data import expected_files, find_local
from eval.lm_eval_tasks import known_tasks, members, scores_of
from eval.tasks.base import Setting
from eval.tasks.harness import HarnessTask
from tests.tiny import tiny_config
from tests.words import PARTS
from wildcat_kv.models import default_model_path

TASKS = Path(lm_eval.__file__).parent / "tasks"
EXACT = Cell("exact", None)
SNAPKV = Cell("snapkv", "snapkv", ratio=0.5, settings={"sink": 4, "window": 8})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(default_model_path())


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(tiny_config("llama", vocab_size=len(tokenizer), **ids)).eval()


@pytest.fixture
def setting(tokenizer):
    def make(**changes):
        fields = {"seed": 0, "protocol": "context-only", "positions": 4096, "limit": 2}
        return Setting(tokenizer=tokenizer, **{**fields, **changes})

    return make


def write(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def text(prompt, tokenizer):
    return tokenizer.decode(torch.cat((prompt.context, prompt.question)))


# LongBench, as its authors publish it

PARAGRAPHS = "Paragraph 1: Red foxes.\n\nParagraph 2: Blue whales.\n\nParagraph 3: Red foxes."
CODE = "import os\n\ndef first():\n    return 1\n\ndef second():\n"
# Question, answers, classes, the metric, and predictions: right, half right and wrong.
LONGBENCH = {
    "qasper": ("What?", ["A red fox", "the Fox!"], None, "qa_f1", ["a red fox", "red whale", "whale"]),
    "multifieldqa_en": ("What?", ["the red fox"], None, "qa_f1", ["Red fox.", "fox or whale", ""]),
    "hotpotqa": ("Who?", ["Ada Lovelace", "Ada"], None, "qa_f1", [" Ada", "Ada Byron", "Bob"]),
    "2wikimqa": ("Who?", ["Ada Lovelace"], None, "qa_f1", ["Ada Lovelace", "Lovelace", "Bob"]),
    "gov_report": ("", ["The report says a lot."], None, "rouge", ["The report says a lot.", "The report", "No"]),
    "multi_news": ("", ["News of foxes and whales."], None, "rouge", ["News of foxes and whales.", "foxes", ""]),
    "trec": (
        "Question: Who?\nType:",
        ["Individual"],
        ["Individual", "Group", "Title of a person"],
        "classification",
        ["Individual", "Individual or Group", "Group"],
    ),
    "triviaqa": ("Passage:\nAda.\nQuestion: Who?\nAnswer:", ["Ada", "A. L."], None, "qa_f1", ["Ada", "Ada it is", "B"]),
    "samsum": ("Dialogue: A: Hi\nSummary: ", ["A says hi."], None, "rouge", ["A says hi.", "A says", "B"]),
    "passage_count": ("", ["2"], None, "count", ["2", "2 or 3", "3"]),
    "passage_retrieval_en": (
        "Of foxes.",
        ["Paragraph 1"],
        None,
        "retrieval",
        ["Paragraph 1", "1 and 3", "Paragraph 2"],
    ),
    "lcc": ("", ["    return 2"], None, "code_sim", ["    return 2", "# so\n    return first()", "`x`"]),
    "repobench-p": ("def third():\n", ["    return 3"], None, "code_sim", ["    return 3\nmore", "    pass", ""]),
}
PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")


def longbench_row(name, context, words=2000, **changes):
    question, answers, classes, *_ = LONGBENCH[name]
    return {
        "input": question,
        "context": context,
        "answers": answers,
        "length": words,
        "dataset": name,
        "language": "en",
        "all_classes": classes,
        "_id": f"{name}-{words}",
        **changes,
    }


def longbench_context(name):
    return CODE if name in ("lcc", "repobench-p") else f"{PARAGRAPHS}\u2028And “more” \x85 of {name}. " * 12


@pytest.fixture(scope="module")
def longbench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in LONGBENCH:
        rows = [longbench_row(name, longbench_context(name), words) for words in (3999, 4000, 7999, 8000)]
        write(folder, f"longbench/data/{name}_e.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def templates():
    manager = TaskManager(include_path=TASKS / "longbench", include_defaults=False)
    return {name: manager.task_index[f"longbench_{name}_e"].cfg for name in LONGBENCH}


@pytest.mark.parametrize("name", LONGBENCH)
def test_longbench_asks_as_lm_eval_does_after_the_context(name, longbench, templates, setting, tokenizer):
    task = HarnessTask(task=f"longbench_{name}_e")
    samples = task.samples(setting(data_dir=longbench, limit=4))
    context, question = longbench_context(name), LONGBENCH[name][0]
    prompt = templates[name]["doc_to_text"].replace("{{context}}", context).replace("{{question}}", question)
    assert [sample.facets["length"] for sample in samples] == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert [(sample.index, sample.facets["document"]) for sample in samples] == [(n, n) for n in range(4)]
    for sample in samples:
        assert sample.prompt == prompt
        assert text(sample.asked, tokenizer) == prompt
        before = tokenizer.decode(sample.asked.context)
        assert before == prompt[: prompt.index(context)] + context.strip()
        assert question in tokenizer.decode(sample.asked.question)
        options = templates[name]["generation_kwargs"]
        assert (sample.max_new_tokens, list(sample.until)) == (options["max_gen_toks"], options["until"])
        assert sample.reference == LONGBENCH[name][1][0]
        assert sample.tokens == len(sample.asked) + sample.max_new_tokens


@pytest.mark.parametrize("name", LONGBENCH)
def test_longbench_scores_are_those_of_its_own_functions(name, longbench, setting):
    _, answers, classes, kind, predictions = LONGBENCH[name]
    task = HarnessTask(task=f"longbench_{name}_e", limit=1)
    [sample] = task.samples(setting(data_dir=longbench))
    found = [scores_of(sample.loaded, sample.document, [prediction]) for prediction in predictions]
    direct = getattr(theirs, f"{kind}_score")
    strip = str if kind == "code_sim" else str.strip
    for scores, prediction in zip(found, predictions, strict=True):
        expected = max(direct(strip(prediction), answer, all_classes=classes or []) for answer in answers)
        assert scores == {"score": pytest.approx(expected), f"{kind}_score": pytest.approx(expected)}
    right, half, wrong = (scores["score"] for scores in found)
    assert right == pytest.approx(1) and right > half > wrong
    assert list(task.metrics) == ["score", f"{kind}_score", "nll"]
    assert [metric.higher_is_better for metric in task.metrics.values()] == [True, True, False]


@pytest.mark.parametrize("name", LONGBENCH)
def test_longbench_goes_to_chat_models_as_its_authors_send_it(name, longbench, setting):
    task = HarnessTask(task=f"longbench_{name}_e", limit=1)
    [plain], [chat] = (task.samples(setting(data_dir=longbench, chat_template=chat)) for chat in (False, True))
    assert (plain.prompt == chat.prompt) == (name in PLAIN)
    if name not in PLAIN:
        assert f"<|im_start|>user\n{plain.prompt}<|im_end|>\n<|im_start|>assistant\n" in chat.prompt
        assert chat.asked.context.tolist().count(1) == chat.prompt.count("<|im_start|>") - 1


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
def test_longbench_prompts_that_are_too_long_lose_their_middle(protocol, longbench, setting, tokenizer):
    task = HarnessTask(task="longbench_qasper_e", limit=1, max_gen_toks=20)
    whole, cut = (
        task.samples(setting(data_dir=longbench, protocol=protocol, positions=positions))[0]
        for positions in (4096, 421)
    )
    ids = [torch.cat((sample.asked.context, sample.asked.question)).tolist() for sample in (whole, cut)]
    assert len(ids[0]) > 401 and ids[1] == ids[0][:200] + ids[0][-200:] and cut.tokens == 420
    assert cut.prompt_hash == whole.prompt_hash
    with pytest.raises(ValueError, match=r"task='longbench_qasper_e', sample 0: the question has .* tokens"):
        task.samples(setting(data_dir=longbench, positions=120))


def test_other_prompts_are_cut_only_where_that_is_asked_for(tmp_path, setting):
    row = {"id": 0, "context": "No. " * 300, "input": "What is the pass key?", "answer": ["71"], "options": []}
    data = setting(data_dir=write(tmp_path, "infinitebench/passkey.jsonl", [row]))
    [whole] = HarnessTask(task="infinitebench_passkey").samples(data)
    [cut] = HarnessTask(task="infinitebench_passkey", truncate="middle", max_length=206).samples(data)
    assert whole.tokens > 600 and cut.tokens == 206 and len(cut.asked) == 200
    with pytest.raises(ValueError, match=r"sample 0: it has \d+ tokens beside 6 for the answer, and max_length=206"):
        HarnessTask(task="infinitebench_passkey", max_length=206).samples(data)
    task = HarnessTask(task="longbench_qasper_e", truncate="never", max_length=206)
    data = setting(data_dir=write(tmp_path, "longbench/qasper_e.jsonl", [longbench_row("qasper", "Foxes. " * 300)]))
    with pytest.raises(ValueError, match="max_length=206; raise it"):
        task.samples(data)


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
@pytest.mark.parametrize("name", ["hotpotqa", "trec"])
def test_a_sample_is_measured_with_every_cache(name, protocol, longbench, setting, model, tokenizer):
    task = HarnessTask(task=f"longbench_{name}_e", limit=1, max_gen_toks=8)
    [sample] = task.samples(setting(data_dir=longbench, protocol=protocol))
    measure = sample.open(model, tokenizer)
    exact, snapkv, again = measure(EXACT), measure(SNAPKV), measure(EXACT)
    assert (exact.scores, exact.prediction) == (again.scores, again.prediction)
    assert set(snapkv.scores) == set(exact.scores) == set(task.metrics)
    one_token = name == "trec"  # which the whole prompt's own logits tell
    assert (snapkv.scores["nll"] == exact.scores["nll"]) == (one_token and protocol == "full-prompt")
    assert exact.stored_tokens == exact.seen_tokens == len(sample.asked.context)
    assert snapkv.stored_tokens == pytest.approx(exact.seen_tokens / 2, abs=1)
    ids = torch.cat((sample.asked.context, sample.asked.question))[None]
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(greedy, skip_special_tokens=True)
    assert exact.prediction == (expected.split("\n")[0] if sample.until else expected)
    answer = tokenizer(f" {sample.reference}", add_special_tokens=False, return_tensors="pt").input_ids
    logits = model(torch.cat((ids, answer), 1)).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    assert exact.scores["nll"] == pytest.approx(-float(logits.gather(-1, answer[0][:, None]).mean()), abs=1e-4)


# The other families, from local files


def infinitebench(folder, name, **row):
    fields = {"id": 0, "context": "It is said. " * 20, "input": "What?", "answer": [], "options": []}
    return write(folder, f"infinitebench/{name}.jsonl", [{**fields, **row}])


@pytest.mark.parametrize(
    ("task", "file", "row", "right", "wrong"),
    [
        ("passkey", "passkey", {"input": "What is the pass key?", "answer": ["71432"]}, " 71432.", "71433"),
        ("number_string", "number_string", {"answer": "71432"}, "It is 71432", "none"),
        ("kv_retrieval", "kv_retrieval", {"context": '{"a": "b7"}', "answer": ["b7"]}, '"b7"', "b8"),
        ("code_run", "data/code_run", {"input": "func_1(3) is", "answer": [-4]}, "It is -4", "-5"),
        ("math_find", "math_find", {"input": "The median of", "answer": [7.5]}, "7.5", "7"),
        ("code_debug", "code_debug", {"answer": ["f"], "options": ["e", "f", "g", "h"]}, "B", "A"),
        ("longbook_qa_en", "longbook_qa_eng", {"answer": ["A fox", "Ada"]}, "ada", "whale"),
        (
            "longbook_choice_en",
            "longbook_choice_en",
            {"answer": ["fox"], "options": ["owl", "fox", "cow", "bee"]},
            "The answer is B",
            "C",
        ),
        ("longdialogue_qa_en", "longdialogue_qa_eng", {"answer": ["ADA", "ADA L."]}, "Ada", "BOB"),
    ],
)
def test_infinitebench_is_read_in_its_authors_format(task, file, row, right, wrong, tmp_path, setting, tokenizer):
    folder = infinitebench(tmp_path, file, **row)
    [sample] = HarnessTask(task=f"infinitebench_{task}").samples(setting(data_dir=folder))
    context = row.get("context", "It is said. " * 20).strip()
    assert tokenizer.decode(sample.asked.context).endswith(context)
    assert text(sample.asked, tokenizer) == sample.prompt and sample.prompt.count(context) == 1
    scores = [scores_of(sample.loaded, sample.document, [answer]) for answer in (right, wrong)]
    assert scores == [{"score": 1.0}, {"score": 0.0}]
    assert sample.reference == str(row["answer"][0] if isinstance(row["answer"], list) else row["answer"])


def test_mixed_numbers_are_answers_too(tmp_path, setting):
    rows = [
        {"id": n, "context": "1, 2", "input": "The median of", "answer": answer} for n, answer in enumerate([[7], 1.5])
    ]
    folder = write(tmp_path, "infinitebench/math_find.jsonl", rows)
    samples = HarnessTask(task="infinitebench_math_find").samples(setting(data_dir=folder))
    assert [sample.reference for sample in samples] == ["7", "1.5"]


def test_babilong_is_read_by_its_versions(tmp_path, setting, tokenizer):
    for version, facts in (("1k", "Mary went to the office. "), ("2k", "John went home. ")):
        row = {"input": facts * 20, "question": "Where is Mary? ", "target": "office"}
        write(tmp_path, f"babilong/{version}/qa1.jsonl", [row, {**row, "target": "home"}])
    task = HarnessTask(task="babilong_qa1", lengths=["1k", "2k"])
    samples = task.samples(setting(data_dir=tmp_path, limit=1))
    assert [sample.facets["length"] for sample in samples] == ["1k", "2k"]
    for sample, facts in zip(samples, ("Mary went to the office.", "John went home."), strict=True):
        before, after = (tokenizer.decode(ids) for ids in (sample.asked.context, sample.asked.question))
        assert before + after == sample.prompt and after == "\nWhere is Mary?"
        assert before.endswith(facts) and "Where is Charlie?" in before  # of its two examples
        assert scores_of(sample.loaded, sample.document, ["In the Office"]) == {"acc": 1.0}


def test_whole_texts_are_read_on_over_the_cache(tmp_path, setting, model, tokenizer):
    page = " The fox , red , was = = here . \n " * 30
    folder = write(tmp_path, "wikitext/test.jsonl", [{"page": page}])
    task = HarnessTask(task="wikitext")
    [sample] = task.samples(setting(data_dir=folder))
    assert list(task.metrics) == ["nll"] and "The fox, red, was" in sample.prompt
    measure = sample.open(model, tokenizer)
    exact, close = measure(EXACT), measure(SNAPKV)
    ids = torch.tensor([tokenizer.encode(sample.prompt)])
    assert exact.scores["nll"] == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-4)
    assert abs(close.scores["nll"] - exact.scores["nll"]) > 1e-3
    [short] = HarnessTask(task="wikitext", max_length=50).samples(setting(data_dir=folder))
    assert short.tokens == short.ids.shape[1] == 50


# What is missing


@pytest.mark.parametrize(
    ("task", "length", "files"),
    [
        ("longbench_qasper_e", None, "longbench/qasper_e.jsonl or longbench/data/qasper_e.jsonl"),
        ("infinitebench_longbook_qa_en", None, "infinitebench/longbook_qa_en.jsonl or .*/longbook_qa_eng.jsonl"),
        ("babilong_qa1", "1k", "babilong/1k/qa1.jsonl or babilong/data/qa1/1k.jsonl"),
        ("wikitext", None, "wikitext/test.jsonl"),
    ],
)
def test_a_missing_file_is_named_with_its_place(task, length, files, tmp_path, setting):
    harness_task = HarnessTask(task=task, lengths=[length] if length else [])
    for data, place in ((None, "--data-dir FOLDER"), (tmp_path, f"data_dir='{tmp_path}'")):
        with pytest.raises(ValueError, match=f"task='{task}': no dataset on the hub.* put {files} into {place}"):
            harness_task.samples(setting(data_dir=data))


def test_a_benchmark_that_needs_the_hub_says_so(setting):
    with pytest.raises(ValueError, match=r"task='scrolls_qasper': its documents cannot be had: \w+"):
        HarnessTask(task="scrolls_qasper").samples(setting())


@pytest.mark.parametrize("content", ['{"context": "cut', "[1, 2]\n", "", "3\n", b"\xff\xfe"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_damaged_file_is_named(content, suffix, tmp_path, setting):
    path = tmp_path / "longbench" / f"qasper_e.{suffix}"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        ValueError, match=rf"data_dir: .*longbench/qasper_e\.{suffix} (cannot be read|must hold samples)"
    ):
        HarnessTask(task="longbench_qasper_e").samples(setting(data_dir=tmp_path))


def test_a_file_of_something_else_is_told_from_a_missing_one(tmp_path, setting):
    folder = write(tmp_path, "longbench/qasper_e.jsonl", [{"text": "What is this?"}])
    with pytest.raises(ValueError, match=r"its file in data_dir=.* is not in the format of the authors: .*'context'"):
        HarnessTask(task="longbench_qasper_e").samples(setting(data_dir=folder))


def test_a_list_of_samples_is_read_as_lines_of_them(tmp_path, setting):
    path = tmp_path / "longbench" / "hotpotqa_e.json"
    path.parent.mkdir()
    path.write_text(json.dumps([longbench_row("hotpotqa", PARAGRAPHS)], indent=1))
    [sample] = HarnessTask(task="longbench_hotpotqa_e").samples(setting(data_dir=tmp_path))
    assert sample.reference == "Ada Lovelace"
    assert find_local("longbench_trec_e", tmp_path) is None and expected_files("scrolls_qasper") == []


def test_lengths_are_for_tasks_that_have_them(longbench, setting):
    with pytest.raises(ValueError, match=r"task='longbench_qasper_e': lengths=4096 is nothing that it has"):
        HarnessTask(task="longbench_qasper_e", lengths=[4096]).samples(setting(data_dir=longbench))
    with pytest.raises(ValueError, match=r"task='niah_single_1': lengths='4k' must be a number of tokens"):
        HarnessTask(task="niah_single_1", lengths=["4k"]).samples(setting())


# Names


def test_groups_and_tags_are_their_tasks():
    assert sorted(members("longbench_tasks_e")) == sorted(f"longbench_{name}_e" for name in LONGBENCH)
    assert len(members("longbench_e")) == 9  # lm-eval's group forgets the summaries and the counting
    assert len(members("longbench")) == len(members("longbench_tasks")) == 21
    assert len(members("ruler")) == 13 and set(members("ruler")) >= {"niah_single_1", "ruler_vt", "ruler_qa_squad"}
    assert members("babilong") == [f"babilong_qa{number}" for number in range(1, 21)]
    assert members("wikitext") == ["wikitext"]
    assert members("tmlu")  # whose groups are only there
    assert {"ruler", "longbench_tasks_e", "wikitext"} <= set(known_tasks())


def test_a_group_that_changes_its_members_is_refused():
    with pytest.raises(ValueError, match=r"tasks='openllm': it changes fields of its member .*; name the single tasks"):
        members("openllm")


def test_names_are_read_from_disk_the_second_time(monkeypatch, tmp_path):
    monkeypatch.setenv("WILDCAT_KV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda: SimpleNamespace(all_tasks=["one", "two"]))
    assert known_tasks() == ["one", "two"]
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda: pytest.fail("lm-eval's files were read again"))
    assert known_tasks() == ["one", "two"]


def test_names_are_found_where_none_can_be_kept(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WILDCAT_KV_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda: SimpleNamespace(all_tasks=["one"]))
    assert known_tasks() == ["one"]


def test_near_names_are_proposed():
    with pytest.raises(ValueError, match=r"tasks='longbench_qaspr_e': .*did you mean 'longbench_qasper_e'\?"):
        RunConfig(tasks=["longbench_qaspr_e"]).make_tasks()
    with pytest.raises(ValueError, match="`python -m eval tasks` lists the names"):
        members("@@@@")


# RULER, whose samples are made here

RULER = {"niah_single_1": 1024, "niah_multikey_2": 1024, "niah_multikey_3": 1024, "ruler_vt": 1024, "ruler_cwe": 1024}
RULER["ruler_fwe"] = 256  # the slowest to make
PRINT_HASHES = """
import json, sys
from transformers import AutoTokenizer
from eval.tasks.base import Setting
from eval.tasks.harness import HarnessTask
from eval import lm_eval_tasks
from lm_eval.tasks import TaskManager
from wildcat_kv.models import default_model_path

manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
lm_eval_tasks._manager = lambda: manager  # found sooner than all tasks
setting = Setting(AutoTokenizer.from_pretrained(default_model_path()), 0, "context-only", 4096, limit=2)
hashes = {}
for name, length in json.loads(sys.argv[1]):
    hashes[name] = [sample.prompt_hash for sample in HarnessTask(task=name, lengths=[length]).samples(setting)]
print(json.dumps(hashes))
"""


@pytest.fixture(scope="module")
def ruler(tokenizer):
    """Two samples a task."""
    setting = Setting(tokenizer, 0, "context-only", 4096, limit=2)
    return {name: HarnessTask(task=name, lengths=[length]).samples(setting) for name, length in RULER.items()}


def test_rulers_samples_do_not_depend_on_what_was_made_before(ruler, setting):
    """In another process, in another order, and a second time."""
    order = [[name, RULER[name]] for name in ("ruler_cwe", "ruler_vt")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRINT_HASHES, json.dumps(order), str(TASKS / "ruler")]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2])
    hashes = json.loads(found.stdout.splitlines()[-1])
    assert hashes == {name: [sample.prompt_hash for sample in ruler[name]] for name, _ in order}
    again = HarnessTask(task="ruler_cwe", lengths=[1024]).samples(setting())
    assert [sample.prompt_hash for sample in again] == hashes["ruler_cwe"]


@pytest.mark.parametrize("task", ["niah_multikey_2", "ruler_vt", "ruler_cwe"])
def test_another_seed_makes_other_samples(task, ruler, setting):
    other = HarnessTask(task=task, lengths=[1024]).samples(setting(seed=1))
    assert not {sample.prompt for sample in other} & {sample.prompt for sample in ruler[task]}


@pytest.mark.parametrize("task", RULER)
def test_rulers_documents_are_those_of_lm_eval(task, ruler, tokenizer, model, monkeypatch):
    # In a process of its own this one has not drawn yet.
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.cwe_utils", raising=False)
    metadata = {"max_seq_lengths": [RULER[task]], "tokenizer": default_model_path().as_posix()}
    manager = TaskManager(include_path=TASKS / "ruler", include_defaults=False, metadata=metadata)
    lm = HFLM(model, tokenizer=tokenizer, device="cpu")
    monkeypatch.setattr(lm, "generate_until", lambda requests: [requests[0].doc["outputs"][0]] * len(requests))
    found = lm_eval.simple_evaluate(
        lm, tasks=[task], metadata=metadata, task_manager=manager, limit=2, bootstrap_iters=0
    )
    for sample, logged in zip(ruler[task], found["samples"][task], strict=True):
        assert sample.document == logged["doc"]
        assert sample.prompt == logged["arguments"][0][0]
        scores = scores_of(sample.loaded, sample.document, [logged["resps"][0][0]])
        assert scores == {"score": logged[str(RULER[task])]}
        assert sample.max_new_tokens == logged["arguments"][0][1]["max_gen_toks"]


@pytest.mark.parametrize("task", RULER)
@pytest.mark.parametrize("chat", [False, True])
def test_rulers_question_comes_after_its_context(task, chat, ruler, setting, tokenizer):
    [sample, _] = ruler[task] if not chat else (harness_chat(ruler[task], setting), None)
    before, after = (tokenizer.decode(ids) for ids in (sample.asked.context, sample.asked.question))
    assert before + after == sample.prompt
    assert after.startswith("\nWhat is the special magic" if task.startswith("niah") else "\nQuestion:")
    assert sample.document["gen_prefix"] in after and sample.document["gen_prefix"] not in before
    if task.startswith("niah"):
        key = after.split(" for ")[1].split(" mentioned")[0]
        assert before.count(key) == 1 and f"for {key} is: {sample.document['outputs'][0]}" in before
    assert len(sample.asked) + sample.max_new_tokens <= RULER[task] + 60 * chat + 120
    assert sample.facets == {"document": 0, "length": RULER[task]}


def harness_chat(samples, setting):
    """The first sample as a chat message, without making all samples again."""
    task = HarnessTask(task=samples[0].loaded.config.task, lengths=[1024])
    first = samples[0]
    return task._sample(first.loaded, first.document, 0, 0, first.facets["length"], setting(chat_template=True))


@pytest.mark.parametrize("right", [0, 1, 2])
def test_rulers_score_is_the_share_of_what_was_found(right, ruler):
    sample = ruler["ruler_fwe"][0]
    answer = " ".join(sample.document["outputs"][:right]).upper() or "none"
    assert scores_of(sample.loaded, sample.document, [answer]) == {"score": pytest.approx(right / 3)}
    assert sample.reference == ", ".join(sample.document["outputs"])


# Tasks of all kinds, beside lm-eval's own evaluation of them

UTILS = """
import datasets

STORY = "Mary went to the garden. John took the red ball to the kitchen. "

def rows(**_):
    names = ["Mary", "John", "Ada"]
    made = [
        {
            "context": STORY * (4 + 3 * n),
            "question": f"Where is {names[n % 3]}?",
            "choices": ["garden", "the big kitchen", "road"],
            "gold": n % 3,
            "word": f" garden {n}",
        }
        for n in range(9)
    ]
    return {"test": datasets.Dataset.from_list(made[:3]), "train": datasets.Dataset.from_list(made[3:])}
"""
COMMON = """
custom_dataset: !function utils.rows
test_split: test
doc_to_text: "{{context}}\\n{{question}}\\nAnswer:"
"""
KINDS = {
    "my_choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: mcc}]
""",
    "my_spaces": """
output_type: multiple_choice
doc_to_text: "{{context}}\\n{{question}}\\nAnswer: "
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "my_word": """
output_type: loglikelihood
doc_to_target: "{{word}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "my_answer": """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
description: "Answer in one word.\\n\\n"
training_split: train
fewshot_split: train
num_fewshot: 1
generation_kwargs: {max_tokens: 9, until: "\\n", do_sample: false}
filter_list:
  - {name: letters, filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]}
  - {name: all, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "my_mutual": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_mutual_info}]
""",
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "utils.py").write_text(UTILS)
    for name, fields in KINDS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{COMMON}{fields}" if "doc_to_text" not in fields else "")
    plain = COMMON.replace('doc_to_text: "{{context}}\\n{{question}}\\nAnswer:"\n', "")
    (folder / "my_spaces.yaml").write_text(f"task: my_spaces{plain}{KINDS['my_spaces']}")
    return TaskManager(include_path=folder, include_defaults=False)


@pytest.fixture
def own_tasks(mine, monkeypatch):
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda: mine)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["my_choice", "my_spaces", "my_word", "my_answer"])
def test_exact_results_are_those_of_lm_eval(name, chat, mine, own_tasks, setting, model, tokenizer):
    lm = HFLM(model, tokenizer=tokenizer, device="cpu")
    found = lm_eval.simple_evaluate(
        lm, tasks=[name], task_manager=mine, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    logged = [entry for entry in found["samples"][name] if entry["filter"] in ("none", "letters")]
    task = HarnessTask(task=name)
    samples = task.samples(setting(protocol="full-prompt", chat_template=chat, limit=3))
    for sample, entry in zip(samples, logged, strict=True):
        assert sample.prompt == entry["arguments"][0][0]
        outcome = sample.open(model, tokenizer)(EXACT)
        shared = set(outcome.scores) & set(entry)
        assert shared == set(task.metrics) - {"nll"} == {"acc", "acc_norm"} & shared or name == "my_answer"
        assert {key: outcome.scores[key] for key in shared} == {key: float(entry[key]) for key in shared}
        if name == "my_answer":
            assert outcome.prediction == entry["resps"][0][0] and shared == {"exact_match"}
            assert sample.max_new_tokens == 9 and sample.until == ("\n",)
            assert sample.prompt.count("Answer in one word.") == 1
        elif name == "my_word":
            assert -outcome.scores["nll"] * len(sample.answers[0]) == pytest.approx(entry["resps"][0][0][0], abs=1e-4)
        else:
            totals = [resp[0][0] for resp in entry["resps"]]
            assert outcome.prediction == sample.choices[totals.index(max(totals))]


@pytest.mark.parametrize("name", ["my_choice", "my_spaces", "my_word", "my_answer"])
def test_answers_after_the_question_alone_are_measured_with_a_compressed_context(
    name, own_tasks, setting, model, tokenizer
):
    task = HarnessTask(task=name)
    [sample] = task.samples(setting(limit=1))
    assert tokenizer.decode(sample.asked.context).endswith("to the kitchen.")
    measure = sample.open(model, tokenizer)
    exact, compressed = measure(EXACT), measure(SNAPKV)
    assert set(exact.scores) == set(compressed.scores) == set(task.metrics)
    assert compressed.stored_tokens < exact.stored_tokens == len(sample.asked.context)
    if "nll" in task.metrics:
        assert exact.scores["nll"] != compressed.scores["nll"]


def test_examples_are_the_same_in_every_run_of_a_seed(own_tasks, setting):
    """Drawn from other documents, whose text repeats the context."""
    task = HarnessTask(task="my_answer")
    first, again, other = (task.samples(setting(seed=seed, limit=3)) for seed in (0, 0, 1))
    assert [sample.prompt for sample in first] == [sample.prompt for sample in again]
    assert [sample.prompt for sample in first] != [sample.prompt for sample in other]
    assert all(sample.asked.question[-3:].tolist() == first[0].asked.question[-3:].tolist() for sample in first)


def test_choices_after_different_prompts_are_refused(own_tasks, setting):
    with pytest.raises(ValueError, match=r"task='my_mutual': each of its choices comes after another prompt"):
        HarnessTask(task="my_mutual").samples(setting())


def test_a_template_without_a_system_role_gets_no_description(own_tasks, setting, tokenizer):
    template = tokenizer.chat_template
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    try:
        tokenizer.chat_template = refusing + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        [sample] = HarnessTask(task="my_answer").samples(setting(chat_template=True, limit=1))
    finally:
        tokenizer.chat_template = template
    assert "one word" not in sample.prompt and sample.prompt.startswith("<user>Mary went")


def test_a_template_that_takes_parts_loses_no_text(own_tasks, setting, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", PARTS)
    [sample] = HarnessTask(task="my_answer").samples(setting(chat_template=True, limit=1))
    assert "one word" in sample.prompt and "<user> Mary went" in sample.prompt
