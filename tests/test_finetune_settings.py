"""What `phi3-embed finetune` takes, refuses, and lets a resumed training change."""

import json

import pytest
from conftest import ROOT

from phi3_tools.finetune.command import find_start
from phi3_tools.finetune.settings import RATES, check_same_training, parse, record

START = "photographs --model phi3-embed"
EMBEDDING = "--task embedding"
REFUSED = {
    "--epochs 3": "no option --epochs. Did you mean --num-train-epochs",
    "--lr 3": "no option --lr. Did you mean .*--learning-rate",
    "--batch-size 8": "no option --batch-size. Did you mean .*--per-device-train-batch-size",
    "--fp16": "--fp16 needs an accelerator. On a CPU give --bf16",
    "--train some": "Argument --train: invalid choice",
    "--held-out 1.5": "--held-out is 1.5, but must be a share",
    "--rotate -5": "--rotate is -5.0, but must be degrees from 0 to 180",
    "--lora-rank 0": "--lora-rank is 0, but must be 1 or more",
    "--words": "--words goes with --task embedding or align",
    "--matryoshka 8": "--matryoshka, --mini-batch-size and --hard-negatives go with --task embedding",
    "--train head --flip": "--train head computes each image's features once",
    "--train head --streaming --max-steps 9": "--train head computes each image's features once",
    "--streaming": "--streaming needs --max-steps",
    "--streaming --max-steps 9 --dataloader-num-workers 2": "and --dataloader-num-workers 0",
    "--streaming --max-steps 9 --eval-strategy epoch": "a stream has no epochs",
    "--prediction-loss-only": "leaves out the figures that the best checkpoint is chosen by",
    "--resume-from-checkpoint here": "the same command goes on from the last checkpoint",
    "--remove-unused-columns true": "--remove-unused-columns is not taken",
    "--label-names class": "the labels are those of --label-column",
    "--include-for-metrics inputs": "figures are of all validation images at once",
    "--no-eval-do-concat-batches": "figures are of all validation images at once",
    "--batch-eval-metrics": "figures are of all validation images at once",
    "--bf16-full-eval": "evaluation takes the precision of the training",
    "--neftune-noise-alpha 5": "changes word embeddings, which images do not pass",
    "--hub-strategy end": "pushed once, in one commit at the end",
    "--hub-revision draft": "pushed once, in one commit at the end",
    "--train-sampling-strategy group_by_length": "images have no lengths",
    "--metric-for-best-model f1": "is 'f1', but must be 'accuracy', 'macro F1', 'loss'",
    '--accelerator-config {"split_batches":true}': "cut batches of unequal images",
    '--train lora --gradient-checkpointing --gradient-checkpointing-kwargs {"use_reentrant":true}': "get no gradients",
    f"{EMBEDDING} --per-device-train-batch-size 1": "is 1, but an embedding compares the images of a batch",
    f"{EMBEDDING} --per-device-train-batch-size 5": "an even number, 4 or more",
    f"{EMBEDDING} --streaming --max-steps 9 --per-device-train-batch-size 1": "is 1, but an embedding compares",
    f"{EMBEDDING} --label-smoothing-factor 0.1": "has no classes to smooth",
    f"{EMBEDDING} --auto-find-batch-size": "so a smaller one trains otherwise",
    f"{EMBEDDING} --train-sampling-strategy sequential": "two images of a label side by side",
    f"{EMBEDDING} --words --train lora": "goes with --train all or head",
    f"{EMBEDDING} --words --mini-batch-size 4": "goes neither with --fsdp nor with --mini-batch-size",
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize("options", REFUSED)
def test_what_would_do_nothing_or_harm_is_refused_with_a_reason(options):
    with pytest.raises(ValueError, match=REFUSED[options]):
        parse(f"{START} {options}".split())


def test_learning_rate_and_metric_follow_from_what_is_trained_unless_given():
    arguments = parse(f"{START} --train lora".split()).arguments
    assert arguments.learning_rate == RATES["lora"] and arguments.metric_for_best_model == "accuracy"
    given = f"{START} {EMBEDDING} --learning-rate 0.5 --num-train-epochs 2 --bf16 --output here"
    arguments = parse(given.split()).arguments
    assert (arguments.learning_rate, arguments.num_train_epochs, arguments.output_dir) == (0.5, 2, "here")
    assert arguments.metric_for_best_model == "recall@1" and not arguments.dataloader_pin_memory


def test_help_is_short_and_names_the_way_to_the_rest(capsys):
    for option, least, most in (("--help", 40, 110), ("--help-all", 300, 2000)):
        with pytest.raises(SystemExit) as leaving:
            parse([option])
        lines = capsys.readouterr().out.splitlines()
        assert (
            not leaving.value.code and least < len(lines) < most and lines[0].startswith("usage: phi3-embed finetune")
        )
        assert "Default: finetuned" in " ".join(lines)
    with pytest.raises(SystemExit):
        parse(["-h"])
    assert "--help-all" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "said"), [("pixels", "a model of pixels, but"), (".:tower", "Leave out :tower")])
def test_a_model_that_cannot_be_trained_is_told(model, said):
    with pytest.raises(ValueError, match=said):
        find_start(model.replace(".", str(ROOT)))


@pytest.mark.parametrize(
    "first, then, message",
    [
        ("", "--dataloader-num-workers 2 --run-name again --save-total-limit 5", None),
        ("", "--per-device-train-batch-size 4 --gradient-accumulation-steps 4", None),
        ("", "--per-device-train-batch-size 8", "images a step was 16 and is 8.* times --gradient-accumulation-steps"),
        (EMBEDDING, f"{EMBEDDING} --mini-batch-size 4", None),
        (EMBEDDING, f"{EMBEDDING} --per-device-train-batch-size 8 --gradient-accumulation-steps 2", "images a step"),
        ("", "--learning-rate 0.5", "learning_rate was 0.0001 and is 0.5. Give another --output"),
        ("", "--adam-beta2 0.9", "adam_beta2 was 0.999 and is 0.9"),
        ("", "--flip", "flip was False and is True"),
        ("", "--save-steps 7", "save_steps was 500 and is 7"),
    ],
)
def test_a_training_goes_on_with_what_changes_no_number_and_with_nothing_else(first, then, message, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 9}')
    (checkpoint / "optimizer.pt").touch()
    began, now = (record(parse(f"{START} {options}".split()), {"train": 24}) for options in (first, then))
    (tmp_path / "arguments.json").write_text(json.dumps(began))
    if message is None:
        check_same_training(tmp_path, now)
        (checkpoint / "optimizer.pt").unlink()
        message = "holds the weights alone .--save-only-model"
    with pytest.raises(ValueError, match=message):
        check_same_training(tmp_path, now)
