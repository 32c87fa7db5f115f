"""The site's words in both languages: what catalogue terms, states and reasons are called."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

NAVIGATION = (
    ("tasks/index.html", "Tasks", "任务"),
    ("boards/index.html", "Leaderboards", "排行榜"),
    ("methods/index.html", "Methods", "方法"),
    ("venues/index.html", "Venues", "会议期刊"),
    ("readiness.html", "Readiness", "就绪度"),
    ("reading.html", "Reading", "阅读"),
    ("lists.html", "Lists", "清单"),
    ("graph.html", "Graph", "关系图"),
    ("status.html", "Status", "状态"),
)
KINDS = {"model": "模型", "method": "方法", "technique": "技术", "reading": "阅读"}
STEPS = {
    "builds": ("builds", "可构建", "every model is built at its published size and has the published number of parameters"),
    "matches": ("matches", "数值一致", "the numbers equal those of an independent implementation, or checks derived from the equations"),
    "learns": ("learns", "可训练", "it learns on embedded data, well above a stated baseline; stopped and resumed it ends with the same bits"),
    "deploys": ("deploys", "可部署", "saved, reloaded and exported to ONNX it gives the same outputs in ONNX Runtime"),
    "reproduces": ("reproduces", "可复现", "a run here reached the published number, on the published data, by the published protocol"),
}  # fmt: skip
STEPS_ZH = {
    "builds": "每个模型都能按论文规模构建，参数量与公布值一致",
    "matches": "数值与独立实现一致，或通过由公式推出的检验",
    "learns": "在内置数据上训练，明显高于给定基线；中断续训后结果逐位一致",
    "deploys": "保存、重载、导出为 ONNX 后，ONNX Runtime 的输出相同",
    "reproduces": "在论文的数据上、按论文的协议，达到了公布的数字",
}
STATES = {
    "passed": "通过",
    "failed": "未通过",
    "n/a": "不适用",
    "not yet": "尚未",
    "not run": "未运行",
    "not reproduced": "未复现",
}
READING = {
    "checked": ("checked", "已核对"),
    "to_check": ("to check", "待核对"),
    "survey": ("surveys", "综述"),
    "none": ("not marked", "未标记"),
}
RESULTS = {"reproduced": "已复现", "unconfirmed": "未确认", "as published": "如论文所述"}
ACCESS = {
    "open": ("open", "可直接获取"),
    "registration": ("after registration", "需注册"),
    "request": ("on request", "需申请"),
    "gone": ("no longer available", "已下线"),
}
REASONS = (
    (r"a work to read", "供阅读的作品"),
    (r"no code yet", "尚无代码"),
    (r"not verified yet", "尚未验证"),
    (r"verified, but its published number was not reached", "已验证，但未达到公布的数字"),
    (r"verified; its speed was not measured beside a reference", "已验证；尚未与参考实现对比速度"),
    (r"verified, but at ([\d.]+) of the reference's speed in one measurement", r"已验证，但有一项速度只有参考实现的 \1 倍"),
    (r"verified, and at ([\d.]+) of the reference's speed or better", r"已验证，速度不低于参考实现的 \1 倍"),
)  # fmt: skip


def both(en: object, zh: object = "") -> Markup:
    """A text in English and Chinese, of which the page shows one; a text that is the same in both stands once."""
    if not zh or str(zh) == str(en):
        return escape(en)
    return Markup('<span lang="en">{}</span><span lang="zh">{}</span>').format(en, zh)


def step_name(name: str) -> Markup:
    return both(STEPS[name][0], STEPS[name][1])


def state_name(state: str) -> Markup:
    return both(state, STATES.get(state, ""))


def reason(text: str) -> Markup:
    """Why a work is ready, buildable or to watch, in both languages."""
    for pattern, zh in REASONS:
        if found := re.fullmatch(pattern, text):
            return both(text, found.expand(zh))
    steps = "|".join(STEPS)
    if found := re.fullmatch(rf"((?:{steps})(?:(?:, | and )(?:{steps}))*) (failed|not passed)", text):
        names = "、".join(STEPS[name][1] for name in re.split(", | and ", found[1]))
        return both(text, f"{names}：未通过")
    return both(text)
