# classifier_parity.py for two processes that share the parameters (FSDP).
_base_ = 'classifier_parity.py'
runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    # As state_dict_cfg='full', but for offload_to_cpu, which crashes on the CPU.
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True),
    ),
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        device_id='cpu',
        auto_wrap_policy=dict(
            type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy',
            min_num_params=30_000,
        ),
    ),
)
train_dataloader = dict(batch_size=1)
