import pytest, torch
from models import *
@pytest.mark.parametrize("build",[tiny_bert,tiny_gpt2,tiny_llama,tiny_t5])
@pytest.mark.parametrize("dtype",[torch.float32,torch.bfloat16,torch.float16])
def test_m(build,dtype,tmp_path):
    s=torch.random.get_rng_state(); m=build(dtype); assert torch.equal(s,torch.random.get_rng_state())
    d=perturbed(m); x=inputs(m)
    a,b=m(**x),d(**x); assert a.loss.isfinite() and not torch.equal(a.logits,b.logits)
    m2=build(dtype); assert all(torch.equal(p,q) for p,q in zip(m.parameters(),m2.parameters()))
    a.loss.backward()
    d.save_pretrained(tmp_path); e=type(m).from_pretrained(tmp_path,dtype=dtype); assert torch.equal(e.eval()(**x).logits,b.logits)
    print(build.__name__,dtype,sum(p.numel() for p in m.parameters()))
    import peft_graft
    from peft import get_peft_model, PeftModel
    g=get_peft_model(build(dtype),peft_graft.GraftConfig(donor=d,density=0.1,selection="magnitude",target_modules="all"))
    g.eval()(**x)
    if build is tiny_gpt2: assert d.lm_head.weight is d.transformer.wte.weight
