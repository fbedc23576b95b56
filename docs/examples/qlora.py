"""QLoRA: the base model in 4 bits, the adapter in float32. Needs bitsandbytes: pip install bitsandbytes.

python qlora.py MODEL FOLDER  # a folder or a name of the hub; where the adapter goes
"""

import importlib.util
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import forgetless as fl

if importlib.util.find_spec("bitsandbytes") is None:
    raise SystemExit("this example needs bitsandbytes: pip install bitsandbytes")

name, folder = sys.argv[1:]
texts = ["Order 17 goes to Lima.", "Order 18 goes to Oslo.", "Order 19 goes to Kyiv."]  # put yours here
device = "cuda" if torch.cuda.is_available() else "cpu"

tokenizer = AutoTokenizer.from_pretrained(name)
packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(
    name, dtype=torch.bfloat16, quantization_config=packed, device_map={"": device}
)
fl.adapt(model, fl.CLoRA(rank=8, k=64))
model.gradient_checkpointing_enable({"use_reentrant": False})  # less memory, more time

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
for epoch in range(3):
    for text in texts:
        row = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        loss = model.train()(input_ids=row, labels=row).loss
        (loss + fl.penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
print(fl.explain(model))
fl.save(model, folder)  # loads onto the packed model and onto the one in full precision
