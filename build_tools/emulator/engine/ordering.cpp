#include "ordering.h"

#include "cta.h"

namespace gnaforge::emulator {

Ordering ordering_of(const Instruction& in, bool weak_by_default) {
  bool fence = in.parts[0] == "fence" || in.parts[0] == "membar";
  bool both = in.has("acq_rel") || in.has("sc") || (fence && !in.has("acquire") && !in.has("release"));
  Ordering order{};
  order.acquire = both || in.has("acquire");
  order.release = both || in.has("release");
  // .volatile counts as .relaxed with system scope.
  order.strong =
      !weak_by_default || order.acquire || order.release || in.has("relaxed") || in.has("volatile") || in.has("mmio");
  order.wide = order.strong && !in.has("cta");
  return order;
}

void SyncPlaces::publish(uint64_t address, Warp& warp, Ordering order, bool replaces) {
  Place& place = places_[address];
  uint32_t cta = warp.cta.linear_id;
  if (replaces && (place.writer != &warp || place.cta != cta))
    place = {};  // warps of CTAs that are over leave their addresses to others
  if (place.cta != cta) place.narrow = {};
  place.writer = &warp;
  place.cta = cta;
  const Clock released = order.release ? warp.publish() : warp.fenced;
  place.narrow.join(released);
  if (!order.wide) return;
  const Clock& wide = order.release ? released : warp.fenced_wide;
  join(place.wide[cta], wide.at);
  if (wide.others)
    for (const auto& [other, stamps] : *wide.others) join(place.wide[other], stamps);
}

void SyncPlaces::observe(uint64_t address, Warp& warp, Ordering order) const {
  auto found = places_.find(address);
  if (found == places_.end()) return;
  const Place& place = found->second;
  Clock& into = order.acquire ? warp.clock : warp.observed;
  uint32_t cta = warp.cta.linear_id;
  if (place.cta == cta) into.join(place.narrow);
  if (!order.wide) return;
  if (place.wide.size() > place.wide.count(cta)) into.join_others(place.wide);
  auto own = place.wide.find(cta);
  if (own != place.wide.end()) join(into.at, own->second);
}

void fence(Warp& warp, Ordering order) {
  if (order.acquire) {
    join(warp.clock.at, warp.observed.at);
    if (order.wide && warp.observed.others) warp.clock.join_others(*warp.observed.others);
  }
  if (!order.release) return;
  warp.fenced = warp.publish();
  if (order.wide) warp.fenced_wide = warp.fenced;
}

bool GlobalAccesses::before(const Past& past, uint32_t cta, const Clock& clock) {
  if (past.stamp == 0) return true;
  if (past.cta == (cta & 0xffffff)) return clock.at[past.agent] >= past.stamp;
  if (!clock.others) return false;
  auto known = clock.others->find(past.cta);
  return known != clock.others->end() && known->second[past.agent] >= past.stamp;
}

void GlobalAccesses::access(uint64_t address, uint64_t size, uint32_t cta, const Clock& clock, Epoch by, bool writes) {
  if (!checks_) return;
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  if (locked_) lock.lock();
  uint64_t end = address + size;
  if (!writes && (end <= first_ || address >= last_)) return;
  while (address < end) {
    uint64_t page = address / kPage, stop = std::min(end, (page + 1) * kPage);
    auto found = pages_.find(page);
    if (found == pages_.end() && writes) {
      found = pages_.try_emplace(page, kPage / kCell).first;
      first_ = std::min(first_, page * kPage);
      last_ = std::max(last_, (page + 1) * kPage);
    }
    for (uint64_t at = address; found != pages_.end() && at < stop; at = (at / kCell + 1) * kCell) {
      Cell& cell = found->second[at % kPage / kCell];
      auto check = [&](const Past& past, bool strong, const char* how) {
        bool same_instruction = past.stamp == by.stamp && past.agent == by.agent && past.cta == (cta & 0xffffff);
        if (same_instruction || (strong && by.strong) || before(past, cta, clock)) return;
        throw EmulationError(std::string("race: ") + (writes ? "write to" : "read of") + " global memory at " +
                             hex(at) + ", which " + name_of_agent(past.agent) +
                             (past.cta == (cta & 0xffffff) ? "" : " of CTA number " + std::to_string(past.cta)) +
                             " has " + how + ", and no barrier, release and acquire or wait orders the two");
      };
      check(cell.write, cell.strong_write, "written");
      if (writes) check(cell.read, cell.strong_read, "read");
      Past now;
      now.stamp = by.stamp;
      now.cta = cta & 0xffffff;
      now.agent = by.agent;
      if (writes) {
        cell = {};
        cell.write = now;
        cell.strong_write = by.strong;
      } else {
        cell.read = now;
        cell.strong_read = by.strong;
      }
    }
    address = stop;
  }
}

void GlobalAccesses::publish(uint64_t address, Warp& warp, Ordering order, bool replaces) {
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  if (locked_) lock.lock();
  places_.publish(address, warp, order, replaces);
}

void GlobalAccesses::observe(uint64_t address, Warp& warp, Ordering order) {
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  if (locked_) lock.lock();
  places_.observe(address, warp, order);
}

RunningWrites::Pages GlobalAccesses::written() const {
  RunningWrites::Pages pages;
  for (const auto& [page, cells] : pages_)
    for (size_t i = 0; i < cells.size(); ++i)
      if (cells[i].write.stamp != 0) pages[page].set(i);
  return pages;
}

}  // namespace gnaforge::emulator
