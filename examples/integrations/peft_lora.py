"""PEFT LoRA on a small GPT-2: the spectrum of W + s·B·A sets the rate of A and B. Seconds on a CPU.

pip install tbfast peft transformers
python examples/integrations/peft_lora.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import tbfast

torch.manual_seed(0)
VOCABULARY, LENGTH = 32, 24
# A model of your own: AutoModelForCausalLM.from_pretrained(...); this one knows nothing yet.
base = GPT2LMHeadModel(
    GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=64,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
)
model = get_peft_model(
    base, LoraConfig(r=8, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
balancer = tbfast.attach(optimizer, model)  # the one added line

for _ in range(60):
    start = torch.randint(VOCABULARY, (16, 1))
    tokens = (start + torch.arange(LENGTH)) % VOCABULARY  # text to learn: counting
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"loss {loss.item():.3f}")
for name, alpha in balancer.alphas.items():
    layer = name.removeprefix("base_model.model.transformer.").removesuffix(".base_layer.weight")
    print(f"  {layer}  alpha {alpha:.3f}  rate ×{balancer.factors[name]:.3f}")
