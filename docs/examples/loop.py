"""Your own loop: adapt, calibrate on text to keep, train, see the drift, save.

python loop.py MODEL FOLDER  # a folder or a name of the hub; where the adapter goes
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl

name, folder = sys.argv[1:]
new = ["Order 17 goes to Lima.", "Order 18 goes to Oslo.", "Order 19 goes to Kyiv."]  # put yours here
old = ["The sun rises in the east.", "Water boils at a hundred degrees."]  # what must not be forgotten

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)


def batches(texts: list[str]) -> list[dict[str, torch.Tensor]]:
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    return [{"input_ids": row, "labels": row} for row in rows]


fl.adapt(model, fl.LoRA(rank=8, penalties=(fl.SourceDeviation(0.1),)))
fl.calibrate(model, batches(old))
fl.record_drift(model)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
for epoch in range(3):
    for batch in batches(new):
        loss = model.train()(**batch).loss
        (loss + fl.penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}, largest drift {max(fl.drift(model).values()):.4f}")
fl.save(model, folder)
