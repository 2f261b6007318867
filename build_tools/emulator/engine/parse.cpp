// PTX text to a Module. Covers the statements that nvcc writes and inline assembly with scopes of its own.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <deque>
#include <map>
#include <tuple>
#include <unordered_set>

#include "program.h"

namespace gnaforge::emulator {

std::string Module::place(uint32_t pc) const {
  const Instruction& at = code[pc];
  std::string lines = source(pc);
  return name + ":" + std::to_string(at.line) + ": " + at.text + (lines.empty() ? "" : " (" + lines + ")");
}

std::string Module::source(uint32_t pc) const {
  std::string lines;
  // Calls of inlined functions may form long chains; the innermost ones tell where one is.
  constexpr int kMost = 5;
  int shown = 0;
  for (int at = code[pc].site; at >= 0 && shown < kMost; at = sites[static_cast<size_t>(at)].caller) {
    const Site& site = sites[static_cast<size_t>(at)];
    auto file = files.find(site.file);
    if (site.line <= 0 || file == files.end()) continue;  // 0: made by the compiler
    lines += (shown == 0 ? "" : shown == 1 ? ", called at " : ", ") + file->second + ":" + std::to_string(site.line);
    ++shown;
  }
  return lines;
}

namespace {

struct Register {
  Type type;
  uint32_t slot, index;
};
struct RegisterRange {
  Type type;
  uint32_t count;
};
struct Symbol {
  int64_t value;
};
struct Scope {
  int parent;
  std::map<std::string, Register> registers;
  std::map<std::string, RegisterRange> ranges;
  std::map<std::string, Symbol> symbols;
  std::map<std::string, uint32_t> labels;
  std::map<std::string, std::vector<std::string>> branch_targets;
};
struct LabelUse {
  uint32_t instruction;
  int scope;
};

bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }

class Parser {
 public:
  Parser(const std::string& text, const std::string& name) : text_(text), module_(std::make_shared<Module>()) {
    module_->name = name;
    scopes_.push_back({-1, {}, {}, {}, {}, {}});
  }

  std::shared_ptr<Module> run() {
    try {
      while (skip(), position_ < text_.size()) module_statement();
      // Functions first: they may be called by all kernels, whose registers and memory come behind theirs.
      for (const Body& body : bodies_)
        if (!body.kernel) function(body);
      for (const Body& body : bodies_)
        if (body.kernel) kernel(body);
      finish();
    } catch (const EmulationError& error) {
      throw EmulationError(module_->name + ":" + std::to_string(line_) + ": " + error.what());
    }
    return module_;
  }

 private:
  const std::string& text_;
  std::shared_ptr<Module> module_;
  size_t position_ = 0;
  int line_ = 1, site_ = -1;
  std::map<std::tuple<int, int, int>, int> sites_;  // the last .loc of each place
  std::deque<Scope> scopes_;
  int scope_ = 0;
  std::vector<LabelUse> label_uses_;
  /// A function to be read: what is before its brace, and where its statements begin.
  struct Body {
    std::string head;
    bool kernel;
    size_t position;
    int line;
  };
  std::vector<Body> bodies_;
  Needs needs_;            // of the module's scope and device functions, then of the kernel that is read
  int special_scope_ = 0;  // where special registers are known by name
  uint32_t extern_align_ = 16;

  // --- characters

  void skip() {  // white space and comments
    while (position_ < text_.size()) {
      char c = text_[position_];
      if (c == '\n') ++line_;
      if (std::isspace(static_cast<unsigned char>(c))) {
        ++position_;
      } else if (text_.compare(position_, 2, "//") == 0) {
        while (position_ < text_.size() && text_[position_] != '\n') ++position_;
      } else if (text_.compare(position_, 2, "/*") == 0) {
        size_t end = text_.find("*/", position_);
        if (end == std::string::npos) throw EmulationError("comment without end");
        for (; position_ < end + 2; ++position_) line_ += text_[position_] == '\n';
      } else {
        return;
      }
    }
  }

  /// Everything up to one of `stops` outside quotes, with comments removed.
  std::string until(const char* stops) {
    std::string out;
    while (position_ < text_.size()) {
      char c = text_[position_];
      if (c == '"') {
        size_t end = text_.find('"', position_ + 1);
        if (end == std::string::npos) throw EmulationError("string without end");
        out.append(text_, position_, end + 1 - position_);
        position_ = end + 1;
      } else if (text_.compare(position_, 2, "//") == 0 || text_.compare(position_, 2, "/*") == 0) {
        skip();
        out += ' ';
      } else if (std::strchr(stops, c)) {
        return trimmed(out);
      } else {
        line_ += c == '\n';
        out += c == '\n' || c == '\t' || c == '\r' ? ' ' : c;
        ++position_;
      }
    }
    throw EmulationError("the text ends inside a statement");
  }

  static std::string trimmed(const std::string& s) {
    size_t a = s.find_first_not_of(' '), b = s.find_last_not_of(' ');
    return a == std::string::npos ? "" : s.substr(a, b - a + 1);
  }

  static std::vector<std::string> words(const std::string& s) {
    std::vector<std::string> out;
    size_t i = 0;
    while (i < s.size()) {
      auto blank = [&] { return std::isspace(static_cast<unsigned char>(s[i])) != 0; };
      while (i < s.size() && blank()) ++i;
      size_t start = i;
      while (i < s.size() && !blank()) ++i;
      if (i > start) out.push_back(s.substr(start, i - start));
    }
    return out;
  }

  /// Splits at commas outside all brackets.
  static std::vector<std::string> list(const std::string& s) {
    std::vector<std::string> out;
    int depth = 0;
    std::string item;
    for (char c : s) {
      if (c == '{' || c == '[' || c == '(') ++depth;
      if (c == '}' || c == ']' || c == ')') --depth;
      if (c == ',' && depth == 0) {
        out.push_back(trimmed(item));
        item.clear();
      } else {
        item += c;
      }
    }
    if (!trimmed(item).empty() || !out.empty()) out.push_back(trimmed(item));
    return out;
  }

  std::string end_of_line() {
    size_t end = text_.find('\n', position_);
    if (end == std::string::npos) end = text_.size();
    std::string rest = text_.substr(position_, end - position_);
    position_ = end;
    return rest;
  }

  // --- module scope

  void module_statement() {
    size_t start = position_;
    std::string head = text_.substr(position_, 16);
    auto begins = [&](const char* word) { return head.compare(0, std::strlen(word), word) == 0; };
    if (begins(".version") || begins(".address_size")) {
      end_of_line();
    } else if (begins(".target")) {
      std::string rest = end_of_line();
      size_t at = rest.find("sm_");
      if (at != std::string::npos) module_->target = std::atoi(rest.c_str() + at + 3);
    } else if (begins(".file")) {
      file_statement();
    } else if (begins(".section")) {
      until("{");
      ++position_;
      skip_body();
    } else {
      std::string statement = until("{;");
      // An initialiser's brace belongs to its variable, not to a function.
      if (text_[position_] == '{' && statement.find('=') != std::string::npos) {
        statement += until(";");
      }
      if (statement.find(".entry") != std::string::npos || statement.find(".func") != std::string::npos) {
        bool body = text_[position_] == '{';
        ++position_;
        if (!body) return;
        bodies_.push_back({statement, statement.find(".entry") != std::string::npos, position_, line_});
        skip_body();
      } else if (text_[position_] == ';') {
        ++position_;
        if (statement.find(".pragma") == std::string::npos && statement.find(".alias") == std::string::npos)
          variable(statement);
      } else {
        throw EmulationError("unexpected: " + text_.substr(start, 40));
      }
    }
  }

  /// To behind the brace that closes the one that was just opened.
  void skip_body() {
    for (int depth = 1; depth > 0; ++position_) {
      until("{}");
      depth += text_[position_] == '{' ? 1 : -1;
    }
  }

  void file_statement() {
    std::string rest = end_of_line();
    size_t open = rest.find('"'), close = rest.rfind('"');
    if (open == std::string::npos) return;
    std::string path = rest.substr(open + 1, close - open - 1);
    size_t quote = path.find('"');
    if (quote != std::string::npos) path.resize(quote);
    size_t slash = path.rfind('/');
    module_->files[std::atoi(rest.c_str() + 5)] = slash == std::string::npos ? path : path.substr(slash + 1);
  }

  struct Declared {
    Type type = Type::none;
    uint32_t align = 0, count = 1;
    bool array = false, open = false;
    int vector = 1;
    std::string name, initial;
    uint32_t bytes() const { return count * vector * static_cast<uint32_t>(size_of(type)); }
  };

  /// ".align 16 .b8 name[64] = {...}" after the state space.
  Declared declaration(const std::string& text) {
    Declared out;
    std::string left = text;
    size_t equals = text.find('=');
    if (equals != std::string::npos) {
      left = text.substr(0, equals);
      out.initial = trimmed(text.substr(equals + 1));
    }
    std::vector<std::string> parts = words(left);
    std::string name;
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i] == ".align") {
        out.align = std::stoul(parts.at(++i));
      } else if (parts[i] == ".ptr") {
        if (i + 1 < parts.size() && parts[i + 1][0] == '.' && parts[i + 1] != ".align") ++i;
      } else if (parts[i][0] == '.') {
        if (parts[i] == ".v2" || parts[i] == ".v4") out.vector = parts[i][2] - '0';
        Type type = type_named(parts[i].substr(1));
        if (type != Type::none) out.type = type;
      } else {
        name += parts[i];
      }
    }
    size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      out.array = true;
      std::string count = name.substr(bracket + 1, name.find(']') - bracket - 1);
      out.open = count.empty();
      out.count = out.open ? 0 : std::stoul(count, nullptr, 0);
      name.resize(bracket);
    }
    out.name = name;
    if (out.align == 0) out.align = std::max(1, size_of(out.type) * out.vector);
    return out;
  }

  static uint32_t aligned(uint32_t offset, uint32_t align) { return (offset + align - 1) / align * align; }

  void variable(const std::string& statement) {
    if (trimmed(statement).empty()) return;
    bool shared = statement.find(".shared") != std::string::npos;
    bool local = statement.find(".local") != std::string::npos;
    bool param = statement.find(".param") != std::string::npos;
    bool external = statement.find(".extern") != std::string::npos;
    Declared d = declaration(statement);
    if (d.type == Type::none || d.name.empty()) throw EmulationError("can't read the declaration: " + statement);
    Scope& scope = scopes_[scope_];
    if (shared) {
      if (external || d.open) {
        extern_align_ = std::max(extern_align_, d.align);
        scope.symbols[d.name] = {kDynamicMark};
        return;
      }
      needs_.shared_bytes = aligned(needs_.shared_bytes, d.align);
      scope.symbols[d.name] = {static_cast<int64_t>(kSharedStart + needs_.shared_bytes)};
      needs_.shared_bytes += d.bytes();
    } else if (local || param) {
      needs_.local_bytes = aligned(needs_.local_bytes, std::max(d.align, 8u));
      // What a call passes lives in local memory; .local symbols are offsets, as the state space wants them.
      scope.symbols[d.name] = {static_cast<int64_t>(needs_.local_bytes + (param ? kLocalWindow : 0))};
      needs_.local_bytes += d.bytes();
    } else {
      constexpr uint64_t kAlign = 256;
      Variable v;
      v.name = d.name;
      v.size = d.bytes();
      v.storage = std::make_shared<std::vector<uint8_t>>(v.size + kAlign);
      v.address = (reinterpret_cast<uint64_t>(v.storage->data()) + kAlign - 1) / kAlign * kAlign;
      initialise(d, reinterpret_cast<uint8_t*>(v.address));
      scopes_[0].symbols[d.name] = {static_cast<int64_t>(v.address)};
      module_->variables.push_back(v);
    }
  }

  void initialise(const Declared& d, uint8_t* target) {
    if (d.initial.empty()) return;
    std::string text = d.initial;
    for (char& c : text)
      if (c == '{' || c == '}') c = ' ';
    uint32_t size = size_of(d.type), at = 0;
    for (const std::string& item : list(text)) {
      if (item.empty()) continue;
      Operand value = operand(item);
      if (value.kind != Operand::Kind::immediate) throw EmulationError("initialiser is not a constant: " + item);
      if (at + size > d.bytes()) throw EmulationError("too many initialisers for " + d.name);
      std::memcpy(target + at, &value.value, size);
      at += size;
    }
  }

  // --- functions

  int open_scope() {
    scopes_.push_back({scope_, {}, {}, {}, {}, {}});
    return scope_ = static_cast<int>(scopes_.size()) - 1;
  }

  void kernel(const Body& body) {
    Needs common = needs_;
    special_scope_ = static_cast<int>(scopes_.size());  // its own, opened next
    function(body);
    module_->functions.back().needs = std::move(needs_);
    needs_ = std::move(common);
  }

  void function(const Body& from) {
    const std::string& head = from.head;
    position_ = from.position;
    line_ = from.line;
    site_ = -1;
    Function f;
    f.kernel = from.kernel;
    f.first = static_cast<uint32_t>(module_->code.size());
    open_scope();
    int outer = scopes_[scope_].parent;
    size_t at = head.find(f.kernel ? ".entry" : ".func") + (f.kernel ? 6 : 5);
    while (at < head.size() && head[at] == ' ') ++at;
    if (!f.kernel && head[at] == '(') {
      size_t end = head.find(')', at);
      formals(head.substr(at + 1, end - at - 1), f.return_names, f.return_sizes);
      at = end + 1;
      while (head[at] == ' ') ++at;
    }
    size_t end = at;
    while (end < head.size() && is_name(head[end])) ++end;
    f.name = head.substr(at, end - at);
    size_t open = head.find('(', end), close = head.find(')', end);
    if (open != std::string::npos && close != std::string::npos) {
      std::string inside = head.substr(open + 1, close - open - 1);
      if (f.kernel)
        kernel_params(f, inside);
      else
        formals(inside, f.param_names, f.param_sizes);
    }
    size_t required = head.find(".reqntid");
    if (required != std::string::npos) {
      std::vector<std::string> numbers = list(head.substr(required + 8));
      for (size_t i = 0; i < numbers.size() && i < 3; ++i) f.required_threads[i] = std::atoi(numbers[i].c_str());
      for (int& n : f.required_threads) n = std::max(n, 1);
    }
    module_->functions.push_back(f);
    body();
    scope_ = outer;
  }

  void kernel_params(Function& f, const std::string& text) {
    for (const std::string& item : list(text)) {
      if (item.empty()) continue;
      Declared d = declaration(item.substr(item.find(".param") + 6));
      uint32_t offset = aligned(f.param_bytes, d.align);
      f.params.push_back({offset, d.bytes(), d.align});
      f.param_bytes = offset + d.bytes();
      scopes_[scope_].symbols[d.name] = {static_cast<int64_t>(kParamWindow + offset)};
    }
  }

  void formals(const std::string& text, std::vector<std::string>& names, std::vector<uint32_t>& sizes) {
    for (const std::string& item : list(text)) {
      if (item.empty()) continue;
      if (item.find(".param") == std::string::npos) throw EmulationError("only .param formals are supported: " + item);
      Declared d = declaration(item.substr(item.find(".param") + 6));
      needs_.local_bytes = aligned(needs_.local_bytes, std::max(d.align, 8u));
      int64_t address = static_cast<int64_t>(kLocalWindow + needs_.local_bytes);
      needs_.local_bytes += d.bytes();
      scopes_[scope_].symbols[d.name] = {address};
      names.push_back(std::to_string(address));
      sizes.push_back(d.bytes());
    }
  }

  void body() {
    int depth = 1;
    while (depth > 0) {
      skip();
      if (position_ >= text_.size()) throw EmulationError("the function has no end");
      char c = text_[position_];
      if (c == '{') {
        ++position_;
        ++depth;
        open_scope();
      } else if (c == '}') {
        ++position_;
        --depth;
        if (depth > 0) scope_ = scopes_[scope_].parent;
      } else if (c == ';') {
        ++position_;
      } else if (c == '.') {
        directive();
      } else if (!label()) {
        instruction();
      }
    }
    // Running off the end of a function returns from it.
    Instruction last;
    last.text = "ret";
    last.parts = {"ret"};
    last.line = line_;
    decode(last);
    module_->code.push_back(last);
  }

  bool label() {
    size_t end = position_;
    while (end < text_.size() && is_name(text_[end])) ++end;
    if (end == position_ || end >= text_.size() || text_[end] != ':' || text_[end + 1] == ':') return false;
    std::string name = text_.substr(position_, end - position_);
    position_ = end + 1;
    skip();
    if (text_.compare(position_, 14, ".branchtargets") == 0) {
      position_ += 14;
      scopes_[scope_].branch_targets[name] = list(until(";"));
      ++position_;
    } else {
      scopes_[scope_].labels[name] = module_->code.size();
    }
    return true;
  }

  void directive() {
    if (text_.compare(position_, 4, ".loc") == 0 && std::isspace(static_cast<unsigned char>(text_[position_ + 4]))) {
      return location(words(end_of_line()));
    }
    if (text_.compare(position_, 5, ".file") == 0) return file_statement();
    std::string statement = until(";");
    ++position_;
    if (statement.compare(0, 4, ".reg") == 0) {
      registers(statement.substr(4));
    } else if (statement.compare(0, 7, ".pragma") != 0 && statement.compare(0, 8, ".calltar") != 0) {
      variable(statement);
    }
  }

  /// .loc file line column [, function_name label, inlined_at file line column]; what it names was a .loc before.
  void location(const std::vector<std::string>& parts) {
    auto number = [&](size_t i) { return i < parts.size() ? std::atoi(parts[i].c_str()) : 0; };
    Site site{number(1), number(2), number(3)};
    for (size_t i = 4; i + 3 < parts.size(); ++i) {
      if (parts[i] != "inlined_at") continue;
      auto caller = sites_.find({number(i + 1), number(i + 2), number(i + 3)});
      if (caller != sites_.end()) {
        site.caller = caller->second;
      } else {
        module_->sites.push_back({number(i + 1), number(i + 2), number(i + 3)});
        site.caller = static_cast<int>(module_->sites.size()) - 1;
      }
    }
    site_ = sites_[{site.file, site.line, site.column}] = static_cast<int>(module_->sites.size());
    module_->sites.push_back(site);
  }

  void registers(const std::string& text) {
    size_t dot = text.find('.'), space = text.find(' ', dot);
    Type type = type_named(text.substr(dot + 1, space - dot - 1));
    if (type == Type::none) throw EmulationError("unknown register type in .reg" + text);
    for (const std::string& name : list(text.substr(space))) {
      size_t angle = name.find('<');
      Scope& scope = scopes_[scope_];
      if (angle != std::string::npos)
        scope.ranges[name.substr(0, angle)] = {type, static_cast<uint32_t>(std::stoul(name.substr(angle + 1)))};
      else
        scope.registers[name] = new_register(type);
    }
  }

  Register new_register(Type type) {
    uint32_t bytes = type == Type::pred ? 4 : static_cast<uint32_t>(size_of(type)) * kWarpSize;
    Register made{type, needs_.register_bytes, needs_.register_count++};
    needs_.register_bytes += aligned(bytes, 64);
    return made;
  }

  bool find_register(const std::string& name, Register& out) {
    size_t digits = name.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
    for (int s = scope_; s >= 0; s = scopes_[s].parent) {
      auto found = scopes_[s].registers.find(name);
      if (found != scopes_[s].registers.end()) {
        out = found->second;
        return true;
      }
      if (digits == name.size() || digits == 0) continue;
      auto range = scopes_[s].ranges.find(name.substr(0, digits));
      if (range != scopes_[s].ranges.end() && std::stoul(name.substr(digits)) < range->second.count) {
        out = scopes_[s].registers[name] = new_register(range->second.type);  // only those mentioned take space
        return true;
      }
    }
    return false;
  }

  bool find_symbol(const std::string& name, int64_t& value) {
    for (int s = scope_; s >= 0; s = scopes_[s].parent) {
      auto found = scopes_[s].symbols.find(name);
      if (found == scopes_[s].symbols.end()) continue;
      value = found->second.value;
      return true;
    }
    return false;
  }

  static constexpr int64_t kDynamicMark = int64_t{1} << 40;  // replaced once all static shared memory is known

  // --- operands

  static void broadcast(Operand& op) {
    op.lanes = std::make_shared<std::vector<uint8_t>>(32 + 64 + 128 + 256);
    uint8_t* at = op.lanes->data();
    for (int size : {1, 2, 4, 8})
      for (int lane = 0; lane < kWarpSize; ++lane, at += size) std::memcpy(at, &op.value, size);
  }

  /// A constant; false if it is none. What begins like one and isn't understood to its end is refused.
  static bool number(const std::string& s, int64_t& value) {
    size_t start = !s.empty() && (s[0] == '-' || s[0] == '+') ? 1 : 0;
    while (start < s.size() && s[start] == ' ') ++start;
    if (start >= s.size() || !std::isdigit(static_cast<unsigned char>(s[start]))) return false;
    bool minus = s[0] == '-';
    char kind = s[start] == '0' && start + 1 < s.size()
                    ? static_cast<char>(std::tolower(static_cast<unsigned char>(s[start + 1])))
                    : ' ';
    bool bits = kind == 'f' || kind == 'd';  // of a float
    int base = bits || kind == 'x' ? 16 : kind == 'b' ? 2 : kind == ' ' ? 10 : 8;
    size_t digits = start + (base == 8 || base == 10 ? 0 : 2), end = digits;
    uint64_t magnitude = 0;
    bool fits = true;
    for (; end < s.size() && digit(s[end]) < base; ++end) {
      fits &= !__builtin_mul_overflow(magnitude, static_cast<uint64_t>(base), &magnitude);
      fits &= !__builtin_add_overflow(magnitude, static_cast<uint64_t>(digit(s[end])), &magnitude);
    }
    bool whole = bits ? end - digits == (kind == 'f' ? 8 : 16) : end > digits;
    if (!bits && end < s.size() && s[end] == 'U') ++end;
    if (!whole || !fits || end != s.size()) throw EmulationError("can't read the constant " + s);
    if (minus) magnitude = bits ? magnitude ^ uint64_t{1} << (kind == 'f' ? 31 : 63) : uint64_t{0} - magnitude;
    value = static_cast<int64_t>(magnitude);
    return true;
  }
  static int digit(char c) {
    if (std::isdigit(static_cast<unsigned char>(c))) return c - '0';
    return std::isxdigit(static_cast<unsigned char>(c)) ? std::tolower(static_cast<unsigned char>(c)) - 'a' + 10 : 99;
  }

  Operand operand(const std::string& raw) {
    std::string s = trimmed(raw);
    Operand op;
    if (s.empty() || s == "_") return op;
    if (s[0] == '{' || s[0] == '(') {
      op.kind = Operand::Kind::vector;
      for (const std::string& item : list(s.substr(1, s.size() - 2)))
        if (!item.empty()) op.parts.push_back(operand(item));
      return op;
    }
    if (s[0] == '[') return address(s.substr(1, s.find_last_of(']') - 1));
    size_t bar = s.find('|');
    if (bar != std::string::npos) {
      op.kind = Operand::Kind::vector;
      op.parts = {operand(s.substr(0, bar)), operand(s.substr(bar + 1))};
      return op;
    }
    if (s[0] == '!') {
      op = operand(s.substr(1));
      op.negated = true;
      return op;
    }
    Register reg;
    if (find_register(s, reg)) {
      op.kind = Operand::Kind::reg;
      op.type = reg.type;
      op.slot = reg.slot;
      op.reg_index = reg.index;
      return op;
    }
    if (number(s, op.value)) {
      op.kind = Operand::Kind::immediate;
      broadcast(op);
      return op;
    }
    if (s[0] == '%') return special(s);
    size_t plus = s.find('+');
    if (find_symbol(trimmed(s.substr(0, plus)), op.value)) {
      int64_t extra = 0;
      if (plus != std::string::npos && !number(trimmed(s.substr(plus + 1)), extra))
        throw EmulationError("can't read the operand " + s);
      op.value += extra;
      op.kind = Operand::Kind::immediate;
      op.symbol = s;
      broadcast(op);
      return op;
    }
    op.kind = Operand::Kind::label;
    op.symbol = s;
    return op;
  }

  Operand special(const std::string& name) {
    static const std::map<std::string, Type> kTypes = {{"%clock64", Type::u64},
                                                       {"%globaltimer", Type::u64},
                                                       {"%current_graph_exec", Type::u64},
                                                       {"%gridid", Type::u64},
                                                       {"%is_explicit_cluster", Type::pred}};
    Register reg;
    std::string key = "\x01" + name;  // apart from what a program may declare
    auto& known = scopes_[static_cast<size_t>(special_scope_)].registers;
    auto found = known.find(key);
    if (found != known.end()) {
      reg = found->second;
    } else {
      check_special(name);
      auto type = kTypes.find(name);
      reg = known[key] = new_register(type == kTypes.end() ? Type::u32 : type->second);
      needs_.specials.push_back({name, reg.slot});
    }
    Operand op;
    op.kind = Operand::Kind::reg;
    op.type = reg.type;
    op.slot = reg.slot;
    op.reg_index = reg.index;
    op.clock = name == "%clock" || name == "%clock64" || name == "%globaltimer" || name == "%clock_hi" ||
               name == "%globaltimer_lo" || name == "%globaltimer_hi";
    op.symbol = name;
    return op;
  }

  /// Those that Cta knows values for.
  static void check_special(const std::string& name) {
    static const std::unordered_set<std::string> kPlain = {"%cluster_ctarank",
                                                           "%cluster_nctarank",
                                                           "%is_explicit_cluster",
                                                           "%laneid",
                                                           "%warpid",
                                                           "%nwarpid",
                                                           "%smid",
                                                           "%nsmid",
                                                           "%lanemask_eq",
                                                           "%lanemask_lt",
                                                           "%lanemask_le",
                                                           "%lanemask_gt",
                                                           "%lanemask_ge",
                                                           "%dynamic_smem_size",
                                                           "%total_smem_size",
                                                           "%gridid",
                                                           "%clock",
                                                           "%clock_hi",
                                                           "%clock64",
                                                           "%globaltimer",
                                                           "%globaltimer_lo",
                                                           "%globaltimer_hi"};
    static const std::unordered_set<std::string> kVectors = {
        "%tid", "%ntid", "%ctaid", "%nctaid", "%clusterid", "%nclusterid", "%cluster_ctaid", "%cluster_nctaid"};
    bool axis = name.size() > 2 && name[name.size() - 2] == '.' && name.back() >= 'x' && name.back() <= 'z';
    if (!kPlain.count(name) && !(axis && kVectors.count(name.substr(0, name.size() - 2))))
      throw EmulationError("unknown special register " + name);
  }

  Operand address(const std::string& inside) {
    std::vector<std::string> items = list(inside);
    Operand op;
    op.kind = Operand::Kind::address;
    std::string base = items.at(0), rest;
    size_t plus = base.find_first_of("+-", 1);
    if (plus != std::string::npos) {
      rest = base.substr(plus);
      base = trimmed(base.substr(0, plus));
    }
    if (!rest.empty()) {
      // One offset with its signs: "+8", "-8", "+-8".
      size_t digits = rest.find_first_not_of("+- ");
      bool minus =
          std::count(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(std::min(digits, rest.size())), '-') %
              2 !=
          0;
      if (digits == std::string::npos || !number(rest.substr(digits), op.value))
        throw EmulationError("can't read the address [" + inside + "]");
      if (minus) op.value = -op.value;
    }
    Operand root = operand(base);
    if (root.kind == Operand::Kind::reg) {
      op.has_base = true;
      op.type = root.type;
      op.slot = root.slot;
      op.reg_index = root.reg_index;
    } else if (root.kind == Operand::Kind::immediate) {
      op.value += root.value;
      op.symbol = root.symbol;
    } else {
      throw EmulationError("unknown name in the address [" + inside + "]");
    }
    for (size_t i = 1; i < items.size(); ++i) op.parts.push_back(operand(items[i]));
    return op;
  }

  // --- instructions

  void instruction() {
    Instruction in;
    in.line = line_;
    in.site = site_;
    std::string s = until_statement_end();
    in.text = s;
    if (s[0] == '@') {
      size_t space = s.find(' ');
      std::string guard = s.substr(1, space - 1);
      s = trimmed(s.substr(space));
      in.guard_negated = guard[0] == '!';
      Operand op = operand(in.guard_negated ? guard.substr(1) : guard);
      if (!op.is_register() || op.type != Type::pred) throw EmulationError("the guard is no predicate: " + in.text);
      in.guarded = true;
      in.guard_slot = op.slot;
    }
    size_t space = s.find_first_of(" {[(");
    std::string opcode = s.substr(0, space), rest = space == std::string::npos ? "" : trimmed(s.substr(space));
    for (size_t start = 0; start <= opcode.size();) {
      size_t dot = opcode.find('.', start);
      if (dot == std::string::npos) dot = opcode.size();
      in.parts.push_back(opcode.substr(start, dot - start));
      start = dot + 1;
    }
    for (size_t i = in.parts.size(); i-- > 1;) {
      Type type = type_named(in.parts[i]);
      if (type == Type::none) continue;
      if (in.type == Type::none) {
        in.type = type;
      } else {
        in.type2 = type;
        break;
      }
    }
    for (const std::string& item : list(rest))
      if (!item.empty()) in.args.push_back(operand(item));
    decode(in);
    needs_.wgmma |= in.parts[0] == "wgmma";
    needs_.tcgen05 |= in.parts[0] == "tcgen05";
    uint32_t index = module_->code.size();
    if (in.parts[0] == "bra" || in.parts[0] == "brx" || in.parts[0] == "call") label_uses_.push_back({index, scope_});
    if (in.text.size() > 160) in.text = in.text.substr(0, 157) + "...";
    module_->code.push_back(std::move(in));
  }

  /// A statement's text up to its semicolon; braces inside belong to vector operands.
  std::string until_statement_end() {
    std::string s = until(";");
    ++position_;
    return s;
  }

  uint32_t find_label(const std::string& name, int scope) {
    for (int s = scope; s >= 0; s = scopes_[s].parent) {
      auto found = scopes_[s].labels.find(name);
      if (found != scopes_[s].labels.end()) return found->second;
    }
    throw EmulationError("unknown label " + name);
  }

  void finish() {
    for (const LabelUse& use : label_uses_) {
      Instruction& in = module_->code[use.instruction];
      line_ = in.line;
      if (in.parts[0] == "bra") {
        in.target = find_label(in.args.at(0).symbol, use.scope);
      } else if (in.parts[0] == "brx") {
        branch_list(in, use.scope);
      } else {
        resolve_call(in);
      }
    }
    place_dynamic_shared();
  }

  /// Dynamic shared memory follows what a kernel has of static, aligned as declared; the first KiB is the system's.
  /// Where a device function uses it, all kernels that may call it have it at one place.
  void place_dynamic_shared() {
    auto moved = [](Operand& op, uint32_t by, auto& self) -> bool {
      bool marked = op.value >= kDynamicMark / 2 && op.value < kDynamicMark * 2 && !op.symbol.empty();
      if (marked) {
        op.value += by - kDynamicMark;
        if (op.lanes) broadcast(op);
      }
      for (Operand& part : op.parts) marked |= self(part, by, self);
      return marked;
    };
    std::vector<Function>& functions = module_->functions;
    uint32_t widest = needs_.shared_bytes;
    for (const Function& f : functions) widest = std::max(widest, f.needs.shared_bytes);
    bool one_place = false;
    for (size_t i = 0; i < functions.size(); ++i) {
      Function& f = functions[i];
      size_t end = i + 1 < functions.size() ? functions[i + 1].first : module_->code.size();
      f.needs.dynamic_shared =
          aligned(kSharedStart + (f.kernel && !one_place ? f.needs.shared_bytes : widest), extern_align_);
      for (size_t at = f.first; at < end; ++at)
        for (Operand& op : module_->code[at].args) one_place |= moved(op, f.needs.dynamic_shared, moved) && !f.kernel;
    }
  }

  void branch_list(Instruction& in, int scope) {
    const std::string& name = in.args.at(1).symbol;
    for (int s = scope; s >= 0; s = scopes_[s].parent) {
      auto found = scopes_[s].branch_targets.find(name);
      if (found == scopes_[s].branch_targets.end()) continue;
      for (const std::string& label : found->second) {
        Operand target;
        target.kind = Operand::Kind::label;
        target.value = find_label(label, scope);
        in.args[1].parts.push_back(target);
      }
      return;
    }
    throw EmulationError("unknown branch targets " + name);
  }

  void resolve_call(Instruction& in) {
    for (Operand& op : in.args) {
      if (op.kind != Operand::Kind::label) continue;
      const Function* callee = module_->find(op.symbol);
      if (callee) {
        in.target = callee->first;
        op.value = static_cast<int64_t>(callee - module_->functions.data());
        in.detail[0] = 1;  // a function of this module
      }
      return;
    }
    throw EmulationError("only direct calls are supported: " + in.text);
  }
};

}  // namespace

std::shared_ptr<Module> parse_module(const std::string& text, const std::string& name) {
  return Parser(text, name).run();
}

}  // namespace gnaforge::emulator
