"""FSDP2: adapt first, then shard; the penalty and the save are of all processes together.

torchrun --nproc-per-node 2 fsdp2.py MODEL FOLDER  # a folder or a name of the hub; where the adapter goes
"""

import os
import sys

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl

name, folder = sys.argv[1:]
texts = ["Order 17 goes to Lima.", "Order 18 goes to Oslo."]  # put yours here, of one length or padded

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()

tokenizer = AutoTokenizer.from_pretrained(name)
torch.manual_seed(0)  # the adapters start alike in every process
model = fl.adapt(AutoModelForCausalLM.from_pretrained(name).to(device), fl.CLoRA(rank=8, k=64))
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)

rows = [tokenizer(text, return_tensors="pt")["input_ids"].to(device) for text in texts[rank::count]]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for step in range(3):
    loss = sum(model(input_ids=row, labels=row).loss for row in rows) / len(rows) + fl.penalty(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss of the first process {loss.item():.3f}")
fl.save(model, folder)  # all call it, the first process writes
torch.distributed.destroy_process_group()
