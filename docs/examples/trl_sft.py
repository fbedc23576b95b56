"""SFTTrainer of TRL: the penalty in its loss. Needs TRL: pip install trl.

python trl_sft.py MODEL FOLDER  # a folder or a name of the hub; where the adapter goes
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit(f"this example needs TRL: pip install trl ({error})") from None

name, folder = sys.argv[1:]
places = {17: "Lima", 18: "Oslo", 19: "Kyiv"}  # put yours here
rows = [{"prompt": f"Where does order {number} go?", "completion": f" To {place}."} for number, place in places.items()]

tokenizer = AutoTokenizer.from_pretrained(name)
model = fl.adapt(AutoModelForCausalLM.from_pretrained(name), fl.CLoRA(rank=8, k=64))


class PenaltySFTTrainer(fl.training.PenaltyMixin, SFTTrainer):
    pass


trainer = PenaltySFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
    ),  # fmt: skip
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
fl.save(model, folder)
